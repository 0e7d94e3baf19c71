"""Measures the streamed executor and the controller on a throttled tier; writes the figures of docs/streaming.md.

    python scripts/streaming_bench.py --json streaming.json

Takes about six minutes on two cores; `--only overlap`, `figure`, `prediction`, `link` or `dtypes` measures one part.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import cacheblend_jax as cb
from cacheblend_jax.engine.profile import device_kind, store_name
from cacheblend_jax.evaluation.layer_times import fit_compute
from cacheblend_jax.evaluation.prompts import random_prompt
from cacheblend_jax.evaluation.shapes import SHAPES
from cacheblend_jax.evaluation.tier_speeds import measure_tiers
from cacheblend_jax.runtime.link import SimulatedLink

PAUSE_S = 0.2
TOKENS = 4096
PARTS = ("overlap", "figure", "prediction", "link", "dtypes")
FACTORS = (4.0, 2.0, 1.0, 0.5, 0.25)  # of the throughput at which loading takes as long as recomputing
LINKS = (2.0, 1.0, 0.5)  # of that throughput, between host memory and a device that has its own
SLOW = 0.25  # of that throughput: the tier, and the link, by which dtypes of stored KV are compared
KV_DTYPES = ("int8", "float8_e4m3fn")
LENGTHS = (1024, 2048, 4096, 8160)
RATIOS = (0.15, 0.3, 0.5)
HKVD = cb.BlendConfig(selector="hkvd")  # its blend runs while KV loads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--model", default="bench-16l", help="a named shape, of random weights; or as for load_model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="in 8 chunks, for overlap and figure")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens, for prediction")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where the pictures go")
    parser.add_argument("--compiled", type=Path, help="keep compiled programs there, for another run")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        jax.config.update("jax_compilation_cache_dir", str(parsed.compiled or temporary))
        shape = SHAPES.get(parsed.model)
        model = cb.load_model(parsed.model, dtype="float32") if shape is None else cb.model.random_model(shape)
        bench = Bench(model, parsed.repeats, parsed.tokens, parsed.lengths)
        report: dict[str, Any] = {"device": device_kind(model), "jax": jax.__version__}
        report["balance"] = bench.balance()
        if "overlap" in parsed.only:
            report["overlap"] = bench.overlap(parsed.docs)
        if "figure" in parsed.only:
            report["figure"] = bench.figure(parsed.docs)
        if "prediction" in parsed.only:
            report["prediction"] = bench.prediction()
        if "link" in parsed.only:
            report["link"] = bench.link(parsed.docs)
        if "dtypes" in parsed.only:
            report["dtypes"] = bench.dtypes()
    if parsed.json:
        parsed.json.write_text(json.dumps(report, indent=2) + "\n")


class Bench:
    """A model, a store that holds its prompt's chunks, and the throughput at which loading balances recomputing."""

    def __init__(self, model: cb.Model, repeats: int, tokens: int, lengths: list[int]) -> None:
        self.model, self.repeats, self.tokens, self.lengths = model, repeats, tokens, lengths
        self.store = cb.ChunkStore(host_bytes=2**40)
        self.prompt = random_prompt(model.config.vocab_size, tokens)
        self.resident = cb.Engine(model, self.store, executor="resident")
        self.streamed = cb.Engine(model, self.store, executor="streamed", kept_bytes=0)
        self.resident.precompute(self.prompt)
        self.num_bytes = self.store.stats.host.bytes
        self.recompute_s = 0.0

    def balance(self) -> dict[str, float]:
        self.resident.prefill(self.prompt)
        self.recompute_s = statistics.median(self.ttft(self.resident) for _ in range(self.repeats))
        self.bytes_per_s = self.num_bytes / self.recompute_s
        print(f"T_recompute {self.recompute_s * 1e3:.0f} ms; balanced by {self.bytes_per_s / 1e6:.0f} MB/s", flush=True)
        return {"recompute_s": self.recompute_s, "bytes_per_s": self.bytes_per_s, "num_bytes": self.num_bytes}

    def ttft(self, engine: cb.Engine, mode: str = "blend") -> float:
        return self.stats(engine, mode).ttft_s

    def stats(self, engine: cb.Engine, mode: str = "blend") -> Any:
        time.sleep(PAUSE_S)
        return engine.prefill(self.prompt, mode).stats

    def over(self, executor: str, factor: float) -> cb.Engine:
        """An engine over a tier `factor` times as fast as balance; the model's engines share their programs."""
        store = cb.store.ThrottledStore(self.store, self.bytes_per_s * factor)
        return cb.Engine(self.model, store, HKVD, executor=executor, kept_bytes=0)

    def overlap(self, docs: Path) -> dict[str, float]:
        """Fast tier: streamed against resident. Balanced tier: pipelined against sequential. All interleaved."""
        self.streamed.prefill(self.prompt)
        rounds: dict[str, list[float]] = {
            name: [] for name in ("resident", "streamed", "sequential", "pipelined", "load")
        }
        for _ in range(self.repeats):
            for engine, fast, slow in (
                (self.resident, "resident", "sequential"),
                (self.streamed, "streamed", "pipelined"),
            ):
                rounds[fast].append(self.ttft(engine))
                stats = self.stats(self.over(fast, 1.0))
                rounds[slow].append(stats.ttft_s)
                if engine is self.resident:
                    rounds["load"].append(stats.load_s)
        trace = cb.Trace()
        self.over("streamed", 1.0).prefill(self.prompt, trace=trace)
        trace.save_picture(
            docs / "streaming-timeline.png", f"a streamed prefill: {self.tokens} tokens, r = 0.15, balanced tier"
        )
        result = {name: statistics.median(values) for name, values in rounds.items()}
        layer_s = max(span.ended - span.began for span in trace.lane("compute"))
        result["layer_s"] = layer_s
        result["bound_s"] = (
            1.15 * max(result["load"], result["resident"]) + result["load"] / self.model.config.num_layers
        )
        result["fast_ratio"] = result["streamed"] / result["resident"]
        result["hidden_s"] = trace.overlap_s("compute", "disk")
        print("| | TTFT ms |\n| --- | ---: |")
        for name in ("resident", "streamed", "load", "sequential", "pipelined", "bound_s"):
            print(f"| {name} | {result[name] * 1e3:.0f} |")
        print(f"streamed / resident on a fast tier: {result['fast_ratio']:.3f}", flush=True)
        return result

    def figure(self, docs: Path) -> list[dict[str, float]]:
        """TTFT against the tier's throughput, for full, reuse, sequential and pipelined blend."""
        self.ttft(self.resident, "full"), self.ttft(self.streamed, "reuse"), self.ttft(self.streamed)
        full = statistics.median(self.ttft(self.resident, "full") for _ in range(2))
        rows = []
        for factor in FACTORS:
            runs: dict[str, list[float]] = {"reuse": [], "sequential": [], "pipelined": []}
            for _ in range(2):
                runs["reuse"].append(self.ttft(self.over("streamed", factor), "reuse"))
                runs["pipelined"].append(self.ttft(self.over("streamed", factor)))
                runs["sequential"].append(self.ttft(self.over("resident", factor)))
            row = {"bytes_per_s": factor * self.bytes_per_s, "full": full}
            rows.append(row | {name: statistics.mean(values) for name, values in runs.items()})
            print(line(rows[-1]), flush=True)
        draw(rows, docs / "streaming-ttft.png", f"{self.tokens} tokens in 8 chunks, r = 0.15")
        return rows

    def prediction(self) -> list[dict[str, Any]]:
        """The controller's predicted TTFT against the measured one, over lengths and throughputs."""
        measured = sorted({self.lengths[0], *self.lengths[-2:]})
        compute, fit = fit_compute(self.model, measured, (0.15, 0.5), repeats=2)
        print(f"fit: error {fit['median_error']:.1%} in the median, {fit['worst_error']:.1%} at worst", flush=True)
        speeds = measure_tiers(self.model, lambda: cb.ChunkStore(), repeats=2)
        rows = []
        for tokens in self.lengths:
            self.prompt = random_prompt(self.model.config.vocab_size, tokens)
            self.store.clear()
            self.resident.precompute(self.prompt)
            for factor in (2.0, 1.0, 0.5):
                throttled = cb.store.ThrottledStore(self.store, self.bytes_per_s * factor)
                tier = cb.engine.Tier("disk", throttled.bytes_per_s)
                own = {"model": self.model.fingerprint, "device": device_kind(self.model)}
                own |= {
                    "store": store_name(throttled.directory),
                    "compute": compute,
                    "transfer": speeds.transfer,
                    "fit": {},
                }
                profile = cb.engine.Profile(tiers=speeds.tiers | {"disk": tier}, transfer=speeds.transfer, **own)
                auto = cb.BlendConfig("auto", auto_ratios=RATIOS)
                engine = cb.Engine(self.model, throttled, auto, executor="streamed", profile=profile, kept_bytes=0)
                self.stats(engine)
                runs = [self.stats(engine) for _ in range(2)]
                decision = runs[0].decision
                seconds = statistics.mean(run.ttft_s for run in runs)
                row = {"tokens": tokens, "bytes_per_s": throttled.bytes_per_s, "ratio": decision.ratio}
                row |= {"bound": decision.bound, "computed_chunks": decision.computed_chunks}
                row |= {"predicted_s": decision.predicted_ttft_s, "measured_s": seconds}
                row["error"] = decision.predicted_ttft_s / seconds - 1
                rows.append(row)
                print(
                    "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
                    flush=True,
                )
        print(f"worst error {max(abs(row['error']) for row in rows):.1%}", flush=True)
        return rows

    def link(self, docs: Path) -> list[dict[str, Any]]:
        """TTFT from host memory over a simulated link, against the longer of loading and recomputing."""
        self.ttft(self.resident)
        layers = {factor: SimulatedLink(self.bytes_per_s * factor) for factor in LINKS}
        engines = {
            (factor, kept): cb.Engine(self.model, self.store, HKVD, link=link, kept_bytes=kept)
            for factor, link in layers.items()
            for kept in (0, 2 * self.num_bytes)
        }
        runs: dict[Any, list[float]] = {key: [] for key in ("recompute", *engines)}
        for engine in engines.values():
            self.ttft(engine)
        for _ in range(self.repeats):
            runs["recompute"].append(self.ttft(self.resident))
            for key, engine in engines.items():
                runs[key].append(self.ttft(engine))
        recompute = statistics.median(runs["recompute"])
        rows = []
        for factor in LINKS:
            streamed, kept = (statistics.median(runs[factor, bytes_]) for bytes_ in (0, 2 * self.num_bytes))
            load = self.num_bytes / (self.bytes_per_s * factor)
            row = {"bytes_per_s": self.bytes_per_s * factor, "load": load, "recompute": recompute}
            row |= {"streamed": streamed, "kept": kept, "of_bound": streamed / max(load, recompute)}
            rows.append(row)
            print(line(row), flush=True)
        trace = cb.Trace()
        engines[1.0, 0].prefill(self.prompt, trace=trace)
        trace.save_picture(
            docs / "streaming-link.png", f"{self.tokens} tokens from host memory, r = 0.15, balanced link"
        )
        return rows

    def dtypes(self) -> list[dict[str, Any]]:
        """TTFT from a slow tier, and over a slow link, by what stored KV is quantised to."""
        engines: dict[tuple[str, str], cb.Engine] = {}
        sizes = {}
        for kv_dtype in (None, *KV_DTYPES):
            store, name = cb.ChunkStore(host_bytes=2**40, kv_dtype=kv_dtype), str(kv_dtype)
            cb.Engine(self.model, store, executor="resident").precompute(self.prompt)
            sizes[name] = store.stats.host.bytes
            tier = cb.store.ThrottledStore(store, self.bytes_per_s * SLOW)
            engines["tier", name] = cb.Engine(self.model, tier, HKVD, executor="streamed", kept_bytes=0)
            link = SimulatedLink(self.bytes_per_s * SLOW)
            engines["link", name] = cb.Engine(self.model, store, HKVD, link=link, kept_bytes=0)
        runs: dict[tuple[str, str], list[float]] = {key: [] for key in engines}
        for engine in engines.values():
            self.ttft(engine)
        for _ in range(self.repeats):
            for key, engine in engines.items():
                runs[key].append(self.ttft(engine))
        rows = []
        for name, size in sizes.items():
            seconds = {where: statistics.median(runs[where, name]) for where in ("tier", "link")}
            rows.append({"kv_dtype": name, "bytes": size, "load": size / (self.bytes_per_s * SLOW)} | seconds)
            print(line(rows[-1]), flush=True)
        return rows


def line(row: dict[str, Any]) -> str:
    return "  ".join(f"{name} {x:.4g}" if isinstance(x, float) else f"{name} {x}" for name, x in row.items())


def draw(rows: list[dict[str, float]], path: Path, title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((6.4, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    throughput = np.array([row["bytes_per_s"] for row in rows]) / 1e6
    styles = {"full": "k--", "reuse": "C7s:", "sequential": "C1^-", "pipelined": "C0o-"}
    names = {"full": "full recompute", "reuse": "full KV reuse"}
    for name, style in styles.items():
        label = names.get(name, f"blend, {name}")
        axis.plot(throughput, [row[name] for row in rows], style, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(throughput, [f"{value:.0f}" for value in throughput])
    axis.minorticks_off()
    axis.set(xlabel="throughput of the tier, MB/s", ylabel="TTFT, s", title=title)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
