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

INSTRUCTION = re.compile(r'%?([\w.\-]+) = .*metadata=\{[^}]*op_name="([^"]*)"')
CONTAINERS = ("while", "call", "conditional")  # their events span those of what they hold
# The first that matches counts: a name scope of ours, or XLA's name of the operation.
KINDS = {
    "attention": r"selective_attention|cross_mass|attention_mass",
    "blending": r"blend_kv",
    "selection": r"/select(/|$)",
    "matmul": r"dot_general|gemm|cublas|matmul",
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
        spent = _milliseconds(ProfileData.from_file(str(latest)))
    sources = dict(INSTRUCTION.findall(program.as_text()))
    total = sum(spent.values())
    rows: dict[tuple[str, str], float] = defaultdict(float)
    for name, ms in spent.items():
        source = sources.get(name, "")
        stage = re.search(r"stage_(\d+)", source)
        rows["rest" if stage is None else stage.group(1), _kind(f"{source} {name}")] += ms
    return [{"stage": stage, "kind": kind, "ms": ms, "share": ms / total} for (stage, kind), ms in sorted(rows.items())]


def _kind(source: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, source)), "other")


def _milliseconds(profile: ProfileData) -> dict[str, float]:
    """Time by instruction, on the device alone where it has events: the host's are then those of launching."""
    by_plane: dict[str, dict[str, float]] = {}
    for plane in profile.planes:
        spent: dict[str, float] = defaultdict(float)
        for line in plane.lines:
            for event in line.events:
                name = str(dict(event.stats).get("hlo_op", ""))
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
