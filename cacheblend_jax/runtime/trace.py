"""A prefill's timeline: spans in lanes, saved as a Chrome trace or as a picture that shows their overlap."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cacheblend_jax.errors import CacheBlendError, reason_and_remedy

LANES = ("host", "transfer", "compute")  # they follow the lanes of tiers slower than host memory
PAUSE = "pause"  # the last lane, where there were any
COLOURS = {"host": "C0", "transfer": "C1", "compute": "C2", PAUSE: "C3"}
SLOW_TIER_COLOUR = "C7"


@dataclass(frozen=True)
class Span:
    """One piece of work: `lane`, what it is, its layer (−1: none), and when it began and ended, in seconds."""

    lane: str
    name: str
    layer: int
    began: float
    ended: float
    thread: int


@dataclass
class Trace:
    """Collects spans from several threads. Lanes: slower tiers by name (`disk`), then `host`, `transfer`, `compute`;
    and `pause`, where a prefill let other work go on.

    Args:
        clock: returns the time in seconds; spans that are added must use the same clock.
    """

    clock: Callable[[], float] = time.perf_counter
    spans: list[Span] = field(default_factory=list)

    @contextmanager
    def span(self, lane: str, name: str, layer: int = -1) -> Iterator[None]:
        """Records the time that the body takes."""
        began = self.clock()
        yield
        self.add(lane, name, layer, began, self.clock())

    def add(self, lane: str, name: str, layer: int, began: float, ended: float) -> None:
        """Records a span whose times are known."""
        self.spans.append(Span(lane, name, layer, began, ended, threading.get_ident()))

    def lanes(self) -> list[str]:
        """Returns the lanes' names, those of slower tiers first."""
        used = {span.lane for span in self.spans}
        return [*sorted(used - {*LANES, PAUSE}), *LANES, *({PAUSE} & used)]

    def lane(self, lane: str) -> list[Span]:
        """Returns the lane's spans in order of their start."""
        return sorted((span for span in self.spans if span.lane == lane), key=lambda span: span.began)

    def overlap_s(self, one: str, other: str) -> float:
        """Returns the seconds during which both lanes were busy."""
        ours, theirs = _union(self.lane(one)), _union(self.lane(other))
        return sum(max(min(a[1], b[1]) - max(a[0], b[0]), 0.0) for a in ours for b in theirs)

    def to_chrome(self) -> dict[str, Any]:
        """Returns the trace in the Trace Event Format, for Perfetto and chrome://tracing: one process per lane.

        Within a lane, each thread has a row of its own. Times are microseconds since the start of the first span.

        Source: "Trace Event Format" of Chrome's tracing; complete (`X`) and metadata (`M`) events.
        """
        zero = min((span.began for span in self.spans), default=0.0)
        events: list[dict[str, Any]] = []
        for number, lane in enumerate(self.lanes()):
            spans = self.lane(lane)
            threads = list(dict.fromkeys(span.thread for span in spans))
            events.append(_metadata("process_name", number, 0, {"name": lane}))
            events.append(_metadata("process_sort_index", number, 0, {"sort_index": number}))
            for row in range(len(threads)):
                events.append(_metadata("thread_name", number, row, {"name": f"{lane} {row}"}))
            for span in spans:
                event = {"name": span.name, "cat": lane, "ph": "X", "pid": number, "tid": threads.index(span.thread)}
                event |= {"ts": (span.began - zero) * 1e6, "dur": (span.ended - span.began) * 1e6}
                events.append(event | {"args": {"layer": span.layer}})
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def save(self, path: str | Path) -> None:
        """Writes the Chrome trace.

        Raises:
            CacheBlendError: the file cannot be written.
        """
        try:
            Path(path).write_text(json.dumps(self.to_chrome()) + "\n", encoding="utf-8")
        except OSError as error:
            raise CacheBlendError(f"cannot write the trace {path}: {reason_and_remedy(error)}") from error

    def save_picture(self, path: str | Path, title: str = "") -> None:
        """Draws the lanes over time into a PNG.

        Args:
            title: by default, how long it took.

        Raises:
            CacheBlendError: matplotlib is missing, or the file cannot be written.
        """
        try:
            self._figure(title).savefig(path, dpi=130)
        except OSError as error:
            raise CacheBlendError(f"cannot write {path}: {reason_and_remedy(error)}") from error

    def _figure(self, title: str) -> Any:
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise CacheBlendError(
                f"the timeline picture needs matplotlib: pip install 'cacheblend-jax[plots]' ({error})"
            ) from error
        lanes = [lane for lane in self.lanes() if self.lane(lane)]
        zero = min((span.began for span in self.spans), default=0.0)
        figure = Figure((11, 0.9 + 0.55 * max(len(lanes), 1)), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        for row, lane in enumerate(lanes):
            for span in self.lane(lane):
                _draw_span(axis, row, span, zero)
        axis.set_yticks(range(len(lanes)), lanes)
        axis.set_ylim(len(lanes) - 0.5, -0.5)
        took_ms = (max((span.ended for span in self.spans), default=zero) - zero) * 1e3
        axis.set(xlabel="milliseconds", title=title or f"A prefill of {took_ms:.1f} ms (numbers: its layers)")
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
        return figure


def _metadata(name: str, process: int, thread: int, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": process, "tid": thread, "args": arguments}


def _union(spans: list[Span]) -> list[tuple[float, float]]:
    """Returns the intervals covered by any of the spans, which are in order of their start."""
    merged: list[tuple[float, float]] = []
    for span in spans:
        if merged and span.began <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], span.ended))
        else:
            merged.append((span.began, span.ended))
    return merged


def _draw_span(axis: Any, row: int, span: Span, zero: float) -> None:
    """Draws a bar; layers alternate between two shades, and those of the compute lane show their number."""
    began, milliseconds = (span.began - zero) * 1e3, (span.ended - span.began) * 1e3
    shade = 0.9 if span.layer % 2 == 0 else 0.55
    axis.barh(
        row,
        milliseconds,
        left=began,
        height=0.7,
        color=COLOURS.get(span.lane, SLOW_TIER_COLOUR),
        alpha=shade,
        linewidth=0,
    )
    if span.lane == "compute" and span.layer >= 0:
        axis.text(began + milliseconds / 2, row, str(span.layer), ha="center", va="center", fontsize=6, clip_on=True)
