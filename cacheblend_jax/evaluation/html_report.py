"""An inspection as one HTML file that needs no server and no other file: the prompt, shaded, beside the answers.

Jinja escapes all text. The page's content security policy allows it nothing from outside, and of scripts only its own.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from cacheblend_jax.blend.selectors import selector_of
from cacheblend_jax.errors import CacheBlendError, reason_and_remedy
from cacheblend_jax.evaluation.inspection import Inspection
from cacheblend_jax.evaluation.parts import Part, printable, shortened

SHARE_IN_SCALE = 0.99  # of the tokens: a few that deviate far more than all others would leave those without a shade
LONGEST_TITLE = 80
LEVELS = 10  # of shades: report.css has a class for each


def save_report(inspection: Inspection, path: Path) -> None:
    """Writes `report_html` into a file.

    Raises:
        CacheBlendError: it cannot be written.
    """
    try:
        path.write_text(report_html(inspection), encoding="utf-8")
    except OSError as error:
        raise CacheBlendError(f"cannot write the report {path}: {reason_and_remedy(error)}") from error


def report_html(inspection: Inspection) -> str:
    """Returns an inspection as an HTML page.

    Each token is shaded by its highest deviation over the layers, or that of a layer that the reader chooses, and
    underlined where the blend recomputed it after the check layer; pointing at it shows its values. Beside it stand the
    answers of the four modes. 30 layers of 6,000 tokens make about 1.3 MB.
    """
    style, script = _packaged("report.css"), _packaged("report.js")
    highest = inspection.deviation.max(axis=0)
    top = float(np.quantile(highest[inspection.candidate], SHARE_IN_SCALE)) if inspection.candidate.any() else 0.0
    return _template().render(
        found=inspection,
        title=shortened(" ".join(_text_of(inspection, inspection.parts[-1]).split()), LONGEST_TITLE),
        selector=selector_of(inspection.blend.selector).name,
        stats=inspection.answers["blend"].stats.prefill,
        levels=LEVELS,
        level_values=[top * (level / (LEVELS - 1)) ** 2 for level in range(LEVELS)],
        parts=[
            _ReportedPart(part.name, _note(inspection, part), _tokens(inspection, part, top))
            for part in inspection.parts
        ],
        answers=_answers(inspection),
        **_distances(inspection),
        largest=float(highest.max(initial=0.0)),
        values=_encoded(inspection.deviation),
        style=Markup(style),
        script=Markup(script),
        style_hash=_content_hash(style),
        script_hash=_content_hash(script),
    )


@dataclass(frozen=True)
class _ReportedToken:
    """A token's text, its classes in report.css, what pointing at it says, and the last layer that recomputed it.

    That layer is -1 where none did, and `None` for a token of which nothing was stored.
    """

    text: str
    classes: str
    title: str
    last_layer: int | None


@dataclass(frozen=True)
class _ReportedPart:
    name: str
    note: str
    tokens: list[_ReportedToken]


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_finalize
    )
    return environment.from_string(_packaged("report.html"))


def _finalize(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _packaged(name: str) -> str:
    return (files("cacheblend_jax.evaluation") / "report" / name).read_text(encoding="utf-8")


def _content_hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _text_of(inspection: Inspection, part: Part) -> str:
    return "".join(inspection.texts[part.start : part.stop])


def _tokens(inspection: Inspection, part: Part, top: float) -> list[_ReportedToken]:
    tokens = []
    for number in range(part.start, part.stop):
        text, values = inspection.texts[number], inspection.deviation[:, number]
        classes = ["e"] if not text else ["n"] if "\n" in text else []
        if not inspection.candidate[number]:
            tokens.append(_ReportedToken(text, " ".join(classes), "", None))
            continue
        layer, last = int(values.argmax()), int(inspection.recomputed[:, number].sum()) - 1
        classes.insert(0, f"d{_level(float(values[layer]), top)}")
        if last > inspection.check_layer:
            classes.append("r")
        tokens.append(_ReportedToken(text, " ".join(classes), f"layer {layer}: {values[layer]:.3g}", last))
    return tokens


def _level(deviation: float, top: float) -> int:
    return round((LEVELS - 1) * min(1.0, (deviation / top) ** 0.5)) if top > 0 else 0


def _note(inspection: Inspection, part: Part) -> str:
    """Says what a blend does with a part's tokens."""
    tokens = slice(part.start, part.stop)
    candidate = inspection.candidate[tokens]
    if not candidate.any():
        computed = inspection.recomputed[:, tokens].all()
        return "computed in every layer" if computed else "reused, and exact here"
    later = min(inspection.check_layer + 1, len(inspection.recomputed) - 1)
    chosen = int((inspection.recomputed[later, tokens] & candidate).sum())
    return f"{chosen} recomputed after layer {inspection.check_layer}"


def _answers(inspection: Inspection) -> list[dict[str, Any]]:
    full = inspection.answers["full"]
    reported = []
    for mode, answer in inspection.answers.items():
        stats = answer.stats.prefill
        reported.append(
            {
                "mode": mode,
                "text": answer.text.strip(),
                "same_as_full": mode != "full" and answer.token_ids == full.token_ids,
                "forced": stats.forced,
                "recomputed": round(stats.recompute_ratio * stats.candidates),
                "reused": stats.reused,
                "work": 100 * stats.flops / full.stats.prefill.flops,
            }
        )
    return reported


def _distances(inspection: Inspection) -> dict[str, dict[str, float] | None]:
    shares = {mode: 100 * inspection.cross_attention_share(mode) for mode in ("reuse", "blend")}
    return {
        "deviation": inspection.mean_deviation(),
        "attention": {mode: float(each.mean()) for mode, each in inspection.attention_deviation.items()},
        "cross_attention": shares if np.isfinite(list(shares.values())).all() else None,
    }


def _encoded(deviation: np.ndarray) -> str:
    """Returns values as base64 of 16 bits each, layer by layer: the root of their share of the largest."""
    largest = max(float(deviation.max(initial=0.0)), np.finfo(np.float32).tiny)
    shares = np.sqrt(np.clip(deviation / largest, 0, 1))
    return base64.b64encode(np.round(shares * 65535).astype("<u2").tobytes()).decode()
