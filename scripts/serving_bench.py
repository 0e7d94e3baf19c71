"""Answered tokens per second: many clients at once in a scheduler's slots, against the same requests in turn.

    python scripts/serving_bench.py --model demo
    python scripts/serving_bench.py --model smollm2 --rounds 3
    python scripts/serving_bench.py --model bench-16l --long-prompt 4000 --rounds 3

All chunks are stored and all programs compiled before the first round. Rounds are interleaved: the requests one after
another by `Engine.generate`, then all at once by `Scheduler.submit`, a thread for each client. With `--long-prompt`:
how long an answer that runs waits for its next token while a prompt of so many tokens is prefilled, as one program and
with pauses, and what that costs the prompt.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import cacheblend_jax as cb
from cacheblend_jax.evaluation.shapes import SHAPES
from scripts.bench_parts.weights import random_weights


@dataclass(frozen=True)
class Load:
    """What is asked: `clients` prompts of `tokens` random tokens, most in chunks that all share, in any order."""

    clients: int
    tokens: int
    new_tokens: int
    mode: str
    chunk_tokens: int = 128

    def prompts(self, vocab_size: int) -> list[cb.Prompt]:
        """Returns the prompts, each with a prefix and a question of 24 tokens, or a few more."""
        rng = np.random.default_rng(0)

        def ids(size: int) -> np.ndarray:
            return rng.integers(0, vocab_size, size).astype(np.int32)

        count, rest = divmod(self.tokens - 48, self.chunk_tokens)
        prefix, chunks = ids(24 + rest), [ids(self.chunk_tokens) for _ in range(count)]
        return [cb.Prompt(prefix, [chunks[i] for i in rng.permutation(count)], ids(24)) for _ in range(self.clients)]


@dataclass(frozen=True)
class Round:
    """One pass over the requests.

    Attributes:
        ttft_s: the requests' own times to first token, summed, without waiting for each other.
        cpu_s: of all threads of this process: comparable also where other processes keep the cores busy.
    """

    seconds: float
    cpu_s: float
    ttft_s: float
    num_tokens: int

    @property
    def tokens_per_s(self) -> float:
        """Answered tokens per second."""
        return self.num_tokens / self.seconds


def in_turn(engine: cb.Engine, prompts: list[cb.Prompt], load: Load) -> tuple[Round, list[list[int]]]:
    """Answers the prompts one after another."""
    began = _clocks()
    how = {"max_new_tokens": load.new_tokens, "stop_token_ids": ()}
    answers = [engine.generate(prompt, load.mode, **how) for prompt in prompts]
    return _round(began, answers)


def at_once(scheduler: cb.Scheduler, prompts: list[cb.Prompt], load: Load) -> tuple[Round, list[list[int]]]:
    """Answers the prompts together, each read by a client's thread."""
    answers: list[cb.Generation | None] = [None] * len(prompts)

    def client(number: int) -> None:
        how = {"max_new_tokens": load.new_tokens, "stop_token_ids": ()}
        answer = scheduler.submit(prompts[number], mode=load.mode, **how)
        for _ in answer:
            pass
        answers[number] = answer.result()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(len(prompts))]
    began = _clocks()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return _round(began, [answer for answer in answers if answer is not None])


ALONE = 16  # tokens of an answer that are timed before a long prompt comes


@dataclass(frozen=True)
class Interruption:
    """What a long prompt did to an answer that ran, and what it took.

    Attributes:
        cpu_s: of all threads, without what the answer's tokens take where nothing else is done.
    """

    longest_gap_s: float
    ttft_s: float
    cpu_s: float
    tokens_meanwhile: int
    first_token: int


def interrupted(scheduler: cb.Scheduler, short: cb.Prompt, long: cb.Prompt, load: Load) -> Interruption:
    """Has a long prompt come while a short one's answer runs."""
    running = scheduler.submit(short, mode=load.mode, max_new_tokens=load.new_tokens, stop_token_ids=())
    next(running)
    alone = time.process_time()
    for _ in range(ALONE):
        next(running)
    times, began = [time.perf_counter()], time.process_time()
    token_cpu_s = (began - alone) / ALONE
    answer = scheduler.submit(long, mode=load.mode, max_new_tokens=1, stop_token_ids=())
    while not answer.has_ended:
        next(running)
        times.append(time.perf_counter())
    cpu_s = time.process_time() - began
    running.cancel()
    (token,), stats = answer.result().token_ids, answer.result().stats
    meanwhile = len(times) - 1
    return Interruption(float(max(np.diff(times))), stats.ttft_s, cpu_s - meanwhile * token_cpu_s, meanwhile, token)


def measure_interruptions(
    model: cb.Model, load: Load, long_tokens: int, rounds: int, log: Callable[[str], None]
) -> dict[str, list[Interruption]]:
    """Measures interleaved rounds, with and without pauses; the first one, which compiles, is left out."""
    engine = cb.Engine(model)
    short, long = (
        load.prompts(model.config.vocab_size)[0],
        replace(load, tokens=long_tokens).prompts(model.config.vocab_size)[0],
    )
    engine.precompute(short)
    engine.precompute(long)
    room = engine.buckets.length(max(long_tokens + 1, load.tokens + load.new_tokens))
    measured: dict[str, list[Interruption]] = {"one program": [], "with pauses": []}
    with (
        cb.Scheduler(engine, slots=2, max_tokens=room, steps=1, pausing=False) as uncut,
        cb.Scheduler(engine, slots=2, max_tokens=room, steps=1) as pausing,
    ):
        for number in range(rounds + 1):
            for name, scheduler in zip(measured, (uncut, pausing), strict=True):
                one = interrupted(scheduler, short, long, load)
                if number:
                    measured[name].append(one)
                    log(f"{name}: {asdict(one)}")
    engine.close()
    return measured


def print_interruptions(name: str, measured: dict[str, list[Interruption]]) -> None:
    """Prints a table of medians."""
    print("| model | prefill | longest gap, ms | TTFT, ms | tokens meanwhile | CPU, ms |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for kind, rounds in measured.items():
        median = {each: statistics.median(getattr(one, each) for one in rounds) for each in asdict(rounds[0])}
        times = " | ".join(f"{1e3 * median[each]:.0f}" for each in ("longest_gap_s", "ttft_s"))
        print(f"| {name} | {kind} | {times} | {median['tokens_meanwhile']:.0f} | {1e3 * median['cpu_s']:.0f} |")


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _round(began: tuple[float, float], answers: list[cb.Generation]) -> tuple[Round, list[list[int]]]:
    seconds, cpu_s = (now - then for now, then in zip(_clocks(), began, strict=True))
    ttft_s = sum(answer.stats.prefill.ttft_s - answer.stats.prefill.wait_s for answer in answers)
    token_ids = [answer.token_ids for answer in answers]
    return Round(seconds, cpu_s, ttft_s, sum(map(len, token_ids))), token_ids


def measure(
    model: cb.Model, load: Load, rounds: int, steps: int, log: Callable[[str], None], *, pausing: bool = False
) -> dict:
    """Measures interleaved rounds; returns medians, and whether the answers were the same."""
    engine = cb.Engine(model)
    prompts = load.prompts(model.config.vocab_size)
    for prompt in prompts:
        engine.precompute(prompt)
    room = engine.buckets.length(load.tokens + load.new_tokens)
    same = []
    with cb.Scheduler(engine, slots=load.clients, max_tokens=room, steps=steps, pausing=pausing) as scheduler:
        in_turn(engine, prompts[:1], load)
        at_once(scheduler, prompts, load)
        measured: dict[str, list[Round]] = {"in turn": [], "at once": []}
        for number in range(rounds):
            one, tokens_in_turn = in_turn(engine, prompts, load)
            other, tokens_at_once = at_once(scheduler, prompts, load)
            measured["in turn"].append(one)
            measured["at once"].append(other)
            same.append(sum(map(list.__eq__, tokens_in_turn, tokens_at_once)))
            speeds = f"{one.tokens_per_s:.1f} and {other.tokens_per_s:.1f} tokens/s"
            log(f"round {number + 1}: {speeds}, {same[-1]} of {len(prompts)} answers the same")
    engine.close()
    medians = {
        name: {
            "tokens_per_s": statistics.median(each.tokens_per_s for each in of),
            "prefill_share": statistics.median(each.ttft_s / each.seconds for each in of),
            "rounds": [asdict(each) for each in of],
        }
        for name, of in measured.items()
    }
    pairs = list(zip(*measured.values(), strict=True))
    gain = statistics.median(two.tokens_per_s / one.tokens_per_s for one, two in pairs)
    cpu_gain = statistics.median(one.cpu_s / two.cpu_s for one, two in pairs)
    settings = {"model": model.name, "load": asdict(load), "steps": steps, "same_answers": same}
    return settings | medians | {"gain": gain, "cpu_gain": cpu_gain}


def main() -> None:
    """Prints a table's line, and writes all of it with `--json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help=f"or one of random weights: {', '.join(SHAPES)}")
    parser.add_argument("--dtype", help="cast the weights")
    parser.add_argument("--mode", default="blend")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1000, help="of a prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="decoding steps between returns to the host")
    parser.add_argument("--pausing", action="store_true", help="let prefills that take longer than 100 ms pause")
    parser.add_argument("--long-prompt", type=int, metavar="TOKENS", help="measure what one does to a running answer")
    parser.add_argument("--json", type=Path)
    parsed = parser.parse_args()
    load = Load(parsed.clients, parsed.tokens, parsed.new_tokens, parsed.mode)
    if parsed.model in SHAPES:
        config = SHAPES[parsed.model]
        model = random_weights(config if parsed.dtype is None else replace(config, dtype=parsed.dtype))
    else:
        model = cb.load_model(parsed.model, dtype=parsed.dtype)
    log = lambda line: print(line, flush=True)  # noqa: E731
    if parsed.long_prompt is not None:
        measured = measure_interruptions(model, load, parsed.long_prompt, parsed.rounds, log)
        print_interruptions(parsed.model, measured)
        return
    report = measure(model, load, parsed.rounds, parsed.steps, log, pausing=parsed.pausing)
    one, other = report["in turn"], report["at once"]
    print("| model | in turn, tokens/s | at once, tokens/s | gain | in CPU time | prefills' share in turn | at once |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    speeds = f"{one['tokens_per_s']:.1f} | {other['tokens_per_s']:.1f}"
    gains = f"{report['gain']:.2f} × | {report['cpu_gain']:.2f} ×"
    shares = f"{one['prefill_share']:.0%} | {other['prefill_share']:.0%}"
    print(f"| {parsed.model} | {speeds} | {gains} | {shares} |")
    if parsed.json:
        parsed.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
