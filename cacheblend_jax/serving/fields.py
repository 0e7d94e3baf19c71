"""Reads the fields of a request's JSON, each with its type and bounds. Errors say types, never what texts say."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from cacheblend_jax.serving.errors import ApiError, invalid

KINDS = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}


def parsed_json(body: bytes) -> dict[str, Any]:
    """Parses a request's body.

    Raises:
        ApiError: it is no JSON object; NaN and infinities are no JSON.
    """
    try:
        value = json.loads(body, parse_constant=_refused)
    except (ValueError, RecursionError) as error:
        reason = f"at character {error.pos}" if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise invalid(f"the body is not valid JSON ({reason}); send one JSON object", code="invalid_json") from None
    if not isinstance(value, dict):
        raise invalid(f"the body must be a JSON object, got {kind_of(value)}", code="invalid_json")
    return value


def _refused(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def kind_of(value: object) -> str:
    """Says what a JSON value is."""
    return "null" if value is None else KINDS.get(type(value), "a value")


class Fields:
    """The fields of a JSON object. A field that is missing or null has its default.

    Args:
        name: of the object in errors; empty for the request itself.
    """

    def __init__(self, values: Mapping[str, Any], name: str = "") -> None:
        self._values, self._name = values, name

    def path(self, name: str) -> str:
        """Returns what errors call a field."""
        return f"{self._name}.{name}" if self._name else name

    def get(self, name: str) -> Any:
        """Returns a field's value, whatever it is; `None` where it is missing."""
        return self._values.get(name)

    def text(self, name: str, default: str | None = None) -> str:
        """Returns a string.

        Raises:
            ApiError: it is something else, or missing without a default.
        """
        value = self.get(name)
        if value is None and default is not None:
            return default
        return checked_text(value, self.path(name))

    def flag(self, name: str) -> bool:
        """Returns a boolean, false by default.

        Raises:
            ApiError: it is something else.
        """
        value = self.get(name)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise self._wrong(name, "true or false", value)

    def whole(self, name: str, default: int, *, least: int, most: int) -> int:
        """Returns a whole number.

        Raises:
            ApiError: it is something else, or out of bounds.
        """
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(name, "a whole number", value)
        if not least <= value <= most:
            raise invalid(f"{self.path(name)} must be in [{least}, {most}], got {_shown(value)}", self.path(name))
        return value

    def number(self, name: str, default: float, *, least: float, most: float) -> float:
        """Returns a finite number.

        Raises:
            ApiError: it is something else, or out of bounds.
        """
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._wrong(name, "a number", value)
        if not (least <= value <= most and math.isfinite(value)):
            raise invalid(f"{self.path(name)} must be in [{least:g}, {most:g}], got {_shown(value)}", self.path(name))
        return float(value)

    def items(self, name: str, most: int) -> Sequence[Any]:
        """Returns an array's values, none by default.

        Raises:
            ApiError: it is something else, or has more than `most`.
        """
        value = self.get(name)
        if value is None:
            return ()
        if not isinstance(value, list):
            raise self._wrong(name, "an array", value)
        if len(value) > most:
            raise invalid(f"{self.path(name)} has {len(value)} entries, of at most {most}; send fewer", self.path(name))
        return value

    def fields(self, name: str) -> Fields:
        """Returns the fields of an object, none by default.

        Raises:
            ApiError: it is something else.
        """
        value = self.get(name)
        if value is None:
            return Fields({}, self.path(name))
        return fields_of(value, self.path(name))

    def _wrong(self, name: str, expected: str, value: object) -> ApiError:
        return invalid(f"{self.path(name)} must be {expected}, got {kind_of(value)}", self.path(name))


def fields_of(value: object, name: str) -> Fields:
    """Returns the fields of what must be an object.

    Raises:
        ApiError: it is something else.
    """
    if not isinstance(value, dict):
        raise invalid(f"{name} must be an object, got {kind_of(value)}", name)
    return Fields(value, name)


def checked_text(value: object, name: str) -> str:
    """Returns what must be a string that UTF-8 can encode.

    Raises:
        ApiError: it is something else.
    """
    if not isinstance(value, str):
        raise invalid(f"{name} must be a string, got {kind_of(value)}", name)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise invalid(f"{name} has half of a surrogate pair at character {error.start}", name) from None
    return value


def _shown(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) or abs(value) < 10**15 else "one of many digits"
