"""Who asks: from the key that a request brings to the tenant whose entries it may use."""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from cacheblend_jax.errors import CacheBlendError, is_whole_number
from cacheblend_jax.serving.errors import ApiError

FIELDS = {"tenant", "quota_bytes", "operator"}


@dataclass(frozen=True)
class Caller:
    """Who a key belongs to.

    Attributes:
        tenant: whose entries a request uses; empty where there are no tenants.
        is_operator: whether `/metrics` is shown.
    """

    tenant: str = ""
    is_operator: bool = False


class Tenants:
    """The keys that a server knows. Keys are kept as hashes, and compared in constant time.

    Args:
        callers: who each key belongs to; without any, every request is answered, and is an operator's.
        quotas: bytes that tenants may store.
    """

    def __init__(self, callers: Mapping[str, Caller] | None = None, quotas: Mapping[str, int] | None = None) -> None:
        self._callers = [(_digest(key), caller) for key, caller in (callers or {}).items()]
        self.quotas = dict(quotas or {})

    @property
    def ask_for_keys(self) -> bool:
        """Whether only those who have a key are answered."""
        return bool(self._callers)

    @property
    def count(self) -> int:
        """How many tenants there are: one where no key is asked for."""
        return len({caller.tenant for _, caller in self._callers}) or 1

    @classmethod
    def with_key(cls, key: str) -> Tenants:
        """Returns one tenant, who has the key and may see everything.

        Raises:
            CacheBlendError: the key is empty, or none that a header can hold.
        """
        return cls({_checked_key(key, "the API key"): Caller(is_operator=True)})

    @classmethod
    def from_file(cls, path: Path | str) -> Tenants:
        """Reads a JSON object that gives each key its tenant: a name, or an object.

        An object has `"tenant"`, and may have `"quota_bytes"` (what the tenant may store; of several keys' quotas, the
        smallest counts) and `"operator": true` (whoever may see `/metrics`, which counts all tenants together).

        Raises:
            CacheBlendError: the file cannot be read, is something else, or has a key twice.
        """
        try:
            given = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_each_once)
        except CacheBlendError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            raise CacheBlendError(f"keys file {str(path)!r} cannot be read as JSON: {type(error).__name__}") from error
        if not isinstance(given, dict) or not given:
            raise CacheBlendError(f"keys file {str(path)!r} must be a JSON object of keys and their tenants")
        callers: dict[str, Caller] = {}
        quotas: dict[str, int] = {}
        for number, (key, value) in enumerate(given.items(), 1):
            fields = {"tenant": value} if isinstance(value, str) else value
            callers[_checked_key(key, f"key {number} of {str(path)!r}")] = caller = _caller(fields, number, path)
            if (quota := fields.get("quota_bytes")) is not None:
                if not is_whole_number(quota, least=1):
                    raise CacheBlendError(f"quota_bytes of key {number} must be a whole number of bytes, got {quota!r}")
                quotas[caller.tenant] = min(quota, quotas.get(caller.tenant, quota))
        return cls(callers, quotas)

    def caller(self, authorization: Sequence[str]) -> Caller:
        """Returns who sends a request.

        Args:
            authorization: the values of its headers of that name.

        Raises:
            ApiError: there is no key, or a wrong one.
        """
        if not self.ask_for_keys:
            return Caller(is_operator=True)
        scheme, _, key = authorization[0].partition(" ") if len(authorization) == 1 else ("", "", "")
        if scheme.lower() != "bearer" or not key.strip():
            raise _unauthorized("the API key is missing; send it as 'Authorization: Bearer KEY'")
        digest, found = _digest(key.strip()), None
        for known, caller in self._callers:  # all of them, whichever is the right one
            if hmac.compare_digest(known, digest):
                found = caller
        if found is None:
            raise _unauthorized("the API key is wrong")
        return found


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Returns an object of JSON. Of a key that is there twice, the last would win: perhaps the wrong tenant."""
    if len(dict(pairs)) < len(pairs):
        raise CacheBlendError("the keys file has a key, or a field of one, twice in the same object; remove one")
    return dict(pairs)


def _caller(fields: object, number: int, path: Path | str) -> Caller:
    if not isinstance(fields, dict) or set(fields) - FIELDS or not isinstance(fields.get("tenant"), str):
        raise CacheBlendError(
            f"key {number} of {str(path)!r} must have a tenant's name, or an object with 'tenant', and maybe "
            "'quota_bytes' and 'operator'"
        )
    if not fields["tenant"]:
        raise CacheBlendError(f"key {number} of {str(path)!r} has a tenant with an empty name")
    if not isinstance(fields.get("operator", False), bool):
        raise CacheBlendError(f"operator of key {number} of {str(path)!r} must be true or false")
    return Caller(fields["tenant"], fields.get("operator", False))


def _checked_key(key: str, name: str) -> str:
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise CacheBlendError(f"{name} must be printable ASCII without spaces")
    return key


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()


def _unauthorized(message: str) -> ApiError:
    headers = {"WWW-Authenticate": "Bearer"}
    return ApiError(401, message, code="invalid_api_key", headers=headers)
