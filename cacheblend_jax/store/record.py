"""What is known of an entry on disk: shape, dtype, origin and checksums, of every layer's groups of KV heads.

The record has a checksum of its own.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
import numpy as np
from google_crc32c import value as crc32c_of_bytes

from cacheblend_jax.store.entry import ChunkEntry, QueuedEntry
from cacheblend_jax.store.head_groups import heads_first, num_groups
from cacheblend_jax.store.label import UNKNOWN, Label
from cacheblend_jax.store.quantise import FLOAT8, LARGEST_CODES, SCALES

FORMAT_VERSION = 1
QUANTISED_VERSION = 2  # of records of quantised entries, and of packs that hold one: version 1 knows no codes
GROUPED_VERSION = 3  # of records whose layers are stored in groups of KV heads, quantised or not, and of their packs
READABLE_VERSIONS = (FORMAT_VERSION, QUANTISED_VERSION, GROUPED_VERSION)
DTYPES = ("float32", "bfloat16", "float16")
MORE_ARRAYS = ("k_scales", "v_scales", "k_offset")  # of a quantised entry
MAX_VALUES = 2**56  # of K: the index can add their bytes up
# What taking JSON apart raises where it is not what is expected, however somebody made it so.
MALFORMED = (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError)
_HEX_KEY = re.compile("[0-9a-f]{64}")


class DamagedRecordError(Exception):
    """A record is not as it was written."""


class OtherVersionError(Exception):
    """A record is of a format version that this code does not read."""


class StoredArray(NamedTuple):
    """An array of an entry as it is stored, and the CRC32C of each group of heads of its layers, layer by layer."""

    dtype: np.dtype
    shape: tuple[int, ...]
    crcs: tuple[int, ...]

    @property
    def groups(self) -> int:
        """Groups of heads in a layer; 0 where the checksums are not as many in each."""
        return _groups(self.crcs, self.shape)

    @property
    def group_bytes(self) -> int:
        """Bytes of one group of a layer."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize // self.groups


@dataclass(frozen=True)
class EntryRecord:
    """An entry's metadata.

    Attributes:
        key: the store finds the entry by it.
        tree: the entry's name in the checkpoint's tree; empty where the checkpoint holds this entry alone.
        dtype, shape: of K and of V, `[layers, tokens, kv_heads, head_dim]`.
        crc_k, crc_v: CRC32C of the bytes of each group of heads of each layer, little endian: heads first (see
            `heads_first`), or, where a layer is one group, in C order.
        created: seconds since 1970.
        fingerprint, context_ids, label: see `ChunkEntry`.
        salt: of the store that the entry belongs to, as `salt_hash` gives it.
        kv_dtype: of the codes that K and V are stored as; empty where their values are.
        crc_k_scales, crc_v_scales, crc_k_offset: the same of the other arrays of a quantised entry.
    """

    key: str
    tree: str
    dtype: str
    shape: tuple[int, int, int, int]
    crc_k: tuple[int, ...]
    crc_v: tuple[int, ...]
    created: float
    fingerprint: str
    context_ids: tuple[int, ...]
    salt: str = ""
    label: Label = UNKNOWN
    kv_dtype: str = ""
    crc_k_scales: tuple[int, ...] = ()
    crc_v_scales: tuple[int, ...] = ()
    crc_k_offset: tuple[int, ...] = ()

    @property
    def version(self) -> int:
        """Of the format that the entry needs: the lowest, so that older code reads what it can."""
        if self.groups > 1:
            return GROUPED_VERSION
        return QUANTISED_VERSION if self.kv_dtype else FORMAT_VERSION

    @property
    def groups(self) -> int:
        """Groups of KV heads that each layer is stored and checked in."""
        return _groups(self.crc_k, self.shape)

    @property
    def name(self) -> str:
        """By which files and index know the entry; see `storage_name`."""
        return storage_name(self.key, self.salt)

    @property
    def num_bytes(self) -> int:
        """Bytes of K and V as they are stored."""
        return sum(math.prod(array.shape) * array.dtype.itemsize for array in self.arrays().values())

    def arrays(self) -> dict[str, StoredArray]:
        """Describes what is stored, by name: see `ChunkEntry.arrays`."""
        dtype = np.dtype(np.uint8 if self.kv_dtype == FLOAT8 else self.kv_dtype or self.dtype)
        arrays = {name: StoredArray(dtype, self.shape, crcs) for name, crcs in (("k", self.crc_k), ("v", self.crc_v))}
        if self.kv_dtype:
            arrays["k_scales"] = StoredArray(SCALES, self.shape[:-1], self.crc_k_scales)
            arrays["v_scales"] = StoredArray(SCALES, self.shape[:-1], self.crc_v_scales)
        if self.crc_k_offset:
            shape = (self.shape[0], *self.shape[2:])
            arrays["k_offset"] = StoredArray(np.dtype(self.dtype), shape, self.crc_k_offset)
        return arrays


def _groups(crcs: Sequence[int], shape: Sequence[int]) -> int:
    num_layers = shape[0] if shape else 0
    return 0 if not num_layers or len(crcs) % num_layers else len(crcs) // num_layers


def record_of(queued: QueuedEntry, tree: str, created: float, salt: str = "") -> EntryRecord:
    """Describes an entry, with its checksums."""
    entry = queued.entry
    crcs = checksums_of(entry) if queued.checksums is None else queued.checksums
    return EntryRecord(
        queued.key,
        tree,
        entry.dtype.name,
        entry.k.shape,
        crcs["k"],
        crcs["v"],
        round(created, 3),
        entry.fingerprint,
        tuple(int(token) for token in entry.context_ids),
        salt,
        entry.label,
        entry.kv_dtype or "",
        *(crcs.get(name, ()) for name in MORE_ARRAYS),
    )


def checksums_of(entry: ChunkEntry) -> dict[str, tuple[int, ...]]:
    """Returns the checksums of each array that is stored: of each group of heads, layer by layer."""
    groups = num_groups(entry.k.shape[2])
    return {name: _group_checksums(name, array, groups) for name, array in entry.arrays().items()}


def _group_checksums(name: str, array: np.ndarray, groups: int) -> tuple[int, ...]:
    if groups == 1:
        return layer_checksums(array)
    layers = (np.ascontiguousarray(heads_first(layer, name)).reshape(groups, -1) for layer in array)
    return tuple(checksum(group) for layer in layers for group in layer)


def layer_checksums(array: np.ndarray) -> tuple[int, ...]:
    """Returns the CRC32C of each layer of `[layers, …]`."""
    return tuple(checksum(layer) for layer in array)


def checksum(array: np.ndarray) -> int:
    """Returns the CRC32C of an array's bytes in C order."""
    return crc32c_of_bytes(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def content_of(record: EntryRecord) -> tuple[object, ...]:
    """Returns what two entries of one salt and the same arrays have in common."""
    return record.salt, record.dtype, record.shape, record.kv_dtype, *(each.crcs for each in record.arrays().values())


def salt_hash(salt: str) -> str:
    """Returns what a record says of a store's salt: empty for no salt, and else 64 hexadecimal digits."""
    return sha256(b"cacheblend_jax salt\0" + salt.encode()).hexdigest() if salt else ""


def storage_name(key: str, salt: str = "") -> str:
    """Returns 64 hexadecimal digits for a key: the key itself, or its SHA-256 where it has another form.

    Checkpoints and index hold only this name, so that no key can name a path.

    Args:
        salt: as `salt_hash` gives it: the name is then a hash of both, so that salts never share a name.
    """
    if salt:
        return sha256(f"{salt}:{key}".encode()).hexdigest()
    return key if _HEX_KEY.fullmatch(key) else sha256(key.encode()).hexdigest()


def canonical_json(value: Any) -> bytes:
    """Returns the one text that stands for a value; any other text is damage."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def record_to_json(record: EntryRecord) -> dict[str, Any]:
    """Returns a record as JSON holds it. Versions that know of no salts take the name of a salted entry for its key."""
    salted = {"salt": record.salt, "salted_key": record.key} if record.salt else {}
    known = {name: text for name, text in asdict(record.label).items() if text}
    quantised = {"kv_dtype": record.kv_dtype} if record.kv_dtype else {}
    quantised |= {f"crc_{name}": _packed(crcs) for name in MORE_ARRAYS if (crcs := getattr(record, f"crc_{name}"))}
    return (
        salted
        | known
        | quantised
        | {
            "version": record.version,
            "key": record.name if record.salt else record.key,
            "tree": record.tree,
            "dtype": record.dtype,
            "shape": list(record.shape),
            "crc_k": _packed(record.crc_k),
            "crc_v": _packed(record.crc_v),
            "created": record.created,
            "fingerprint": record.fingerprint,
            "context_ids": list(record.context_ids),
        }
    )


def record_from_json(value: Any) -> EntryRecord:
    """Reads a record and checks that it makes sense.

    Raises:
        OtherVersionError: it is of another format version.
        DamagedRecordError: it is no record, or its fields contradict each other.
    """
    version = value.get("version") if isinstance(value, dict) else None
    check_version(version)
    try:
        salt = value.get("salt", "")
        record = EntryRecord(
            value["salted_key"] if salt else value["key"],
            value["tree"],
            value["dtype"],
            tuple(int(size) for size in value["shape"]),  # type: ignore[arg-type]
            _unpacked(value["crc_k"]),
            _unpacked(value["crc_v"]),
            float(value["created"]),
            value["fingerprint"],
            tuple(value["context_ids"]),
            salt,
            Label(**{field.name: value.get(field.name, "") for field in fields(Label)}),
            value.get("kv_dtype", ""),
            *(_unpacked(value.get(f"crc_{name}", "")) for name in MORE_ARRAYS),
        )
        consistent = (
            version == record.version
            and record.kv_dtype in ("", *LARGEST_CODES)
            and bool(record.kv_dtype) == bool(record.crc_k_scales)
            and record.dtype in DTYPES
            and len(record.shape) == 4
            and min(record.shape) >= 0
            and math.prod(record.shape) < MAX_VALUES
            and record.groups > 0
            and record.shape[2] % record.groups == 0
            and all(array.groups == record.groups for array in record.arrays().values())
            and record.tree in ("", record.name)
            and all(isinstance(text, str) for text in asdict(record.label).values())
            and (not salt or (_HEX_KEY.fullmatch(salt) is not None and value["key"] == record.name))
        )
    except MALFORMED as error:
        raise DamagedRecordError(f"its record cannot be read: {error!r}") from error
    if not consistent:
        raise DamagedRecordError("the fields of its record contradict each other")
    return record


def check_version(version: object) -> None:
    """Checks that a record or a pack is of a format version that this code reads; what is no number is damage.

    Raises:
        OtherVersionError: it is not.
    """
    if isinstance(version, int) and version not in READABLE_VERSIONS:
        first, last = READABLE_VERSIONS[0], READABLE_VERSIONS[-1]
        raise OtherVersionError(f"format version {version}; this code reads versions {first} to {last}")


def dump_record(record: EntryRecord) -> tuple[bytes, int]:
    """Returns a record's text and the text's CRC32C."""
    text = canonical_json(record_to_json(record))
    return text, crc32c_of_bytes(text)


def usable_record(text: object, crc: object, name: str) -> EntryRecord | None:
    """As `load_record`, but `None` where the record is damaged or of another version."""
    try:
        return load_record(text, crc, name)
    except (DamagedRecordError, OtherVersionError):
        return None


def load_record(text: object, crc: object, name: str) -> EntryRecord:
    """Reads what `dump_record` returned, out of an index that may be damaged and hold anything.

    Args:
        name: the storage name of the entry that it should describe.

    Raises:
        DamagedRecordError: its checksum is wrong, it is another entry's, or as `record_from_json`.
        OtherVersionError: it is of another format version.
    """
    if not isinstance(text, bytes) or crc32c_of_bytes(text) != crc:
        raise DamagedRecordError("its record has a wrong checksum")
    try:
        value = json.loads(text)
    except MALFORMED as error:
        raise DamagedRecordError("its record is not JSON") from error
    record = record_from_json(value)
    if record.name != name:
        raise DamagedRecordError("its record is another entry's")
    return record


def _packed(numbers: Sequence[int]) -> str:
    return base64.b64encode(np.asarray(numbers, "<u4").tobytes()).decode()


def _unpacked(text: str) -> tuple[int, ...]:
    return tuple(np.frombuffer(base64.b64decode(text, validate=True), "<u4").tolist())
