"""Where a compiled program's time goes on the device: by stage of the prefill, and by kind of work."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
OP_NAME, STAGE = re.compile(r'op_name="([^"]+)"'), re.compile(r"stage_(\d+)")
CALLED, TARGET = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)"), re.compile(r'custom_call_target="([^"]+)"')
CONTAINERS = ("while", "call", "conditional")  # their events span those of what they hold
# The first that matches counts: a name scope of ours, or XLA's name of the operation.
KINDS = {
    "attention": r"selective_attention|cross_mass|attention_mass",
    "blending": r"blend_kv",
    "selection": r"/select(/|$)",
    "matmul": r"dot_general|gemm|cublas|matmul|nvjet|cutlass|xmma",
}


def time_by_stage(run: Callable[[], Any], program: Any, directory: Path | None = None) -> list[dict[str, Any]]:
    """Profiles one call of a compiled program.

    Args:
        run: calls the program; called once before the profile begins, so that nothing but the call is in it.
        program: what `jax.jit(…).lower(…).compile()` returned; its text says where operations come from.
        directory: where the trace stays; a temporary one by default.

    Returns:
        A row for each stage of a prefill ("rest" before and after) and kind of work: `stage`, `kind` (a key of
        `KINDS`, or "other"), `ms` summed over the device's streams (a CPU's threads), and `share` of the whole.
    """
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as temporary:
        place = temporary if directory is None else str(directory)
        with jax.profiler.trace(place):
            jax.block_until_ready(run())
        latest = max(Path(place).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        return rows_of(ProfileData.from_file(str(latest)), program.as_text())


def rows_of(profile: Any, text: str) -> list[dict[str, Any]]:
    """Returns the rows of `time_by_stage`, from a `ProfileData` and the text of the program that ran."""
    spent, sources = _milliseconds(profile), sources_of(text)
    total = sum(spent.values())
    rows: dict[tuple[str, str], float] = defaultdict(float)
    for name, ms in spent.items():
        source = sources.get(name, "")
        stage = STAGE.search(source)
        rows["rest" if stage is None else stage.group(1), _kind(f"{source} {name}")] += ms
    return [{"stage": stage, "kind": kind, "ms": ms, "share": ms / total} for (stage, kind), ms in sorted(rows.items())]


def sources_of(text: str) -> dict[str, str]:
    """Returns where a compiled program's instructions come from: scopes and operations, and what library they call.

    XLA drops the names of some. Those are called what the computation that they call is; or else they are of the stage
    of the instruction before them, for a program's text has them in the order in which they run.
    """
    sources: dict[str, str] = {}
    names: dict[str, str] = {}  # of computations: that of their root, or what names they have
    computation = stage = ""
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            computation, stage = header[1], ""
        elif instruction := INSTRUCTION.match(line):
            found = OP_NAME.search(line)
            source = found[1] if found else next((names[of] for of in CALLED.findall(line) if names.get(of)), "")
            names[computation] = source or names.get(computation, "")
            if source:
                stage = of_stage[0] if (of_stage := STAGE.search(source)) else ""
            target = TARGET.search(line)
            sources[instruction[1]] = f"{source or stage} {target[1] if target else ''}".strip()
    return sources


def _kind(source: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, source)), "other")


def _milliseconds(profile: Any) -> dict[str, float]:
    """Time by instruction, on the device alone where it has events: the host's are then those of launching."""
    by_plane: dict[str, dict[str, float]] = {}
    for plane in profile.planes:
        spent: dict[str, float] = defaultdict(float)
        for line in plane.lines:
            is_stream = line.name.startswith("Stream")  # of a GPU: a library's kernels may have no name but their own
            for event in line.events:
                name = str(dict(event.stats).get("hlo_op", event.name if is_stream else ""))
                if name and not name.startswith(CONTAINERS):
                    spent[name] += event.duration_ns / 1e6
        if spent:
            by_plane[plane.name] = spent
    devices = [spent for name, spent in by_plane.items() if name.startswith("/device:")]
    merged: dict[str, float] = defaultdict(float)
    for spent in devices or by_plane.values():
        for name, ms in spent.items():
            merged[name] += ms
    return merged
