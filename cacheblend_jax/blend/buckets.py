"""Padded lengths: prompts whose lengths fall into one bucket share their compiled programs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from cacheblend_jax.errors import CacheBlendError, is_whole_number

SMALL_STEP = 128  # lengths up to 1024 are padded to a multiple of this
STEPS_PER_OCTAVE = 32  # above 1024: at most 1/32 is padding
SMALLEST_BUCKET = 32
DOUBLED_UP_TO = 256  # forced tokens up to this count are padded to a power of two


@dataclass(frozen=True)
class Buckets:
    """Pads lengths.

    Attributes:
        lengths: ascending sizes to pad to; few sizes mean few programs. `None`: multiples of 128 up to 1024, then 32
            steps per octave (at most 3.1 % padding). Lengths above the last size are padded as with `None`.
    """

    lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        sizes = self.lengths
        if sizes is not None and (
            not sizes or any(not is_whole_number(size, least=1) for size in sizes) or list(sizes) != sorted(set(sizes))
        ):
            raise CacheBlendError(f"length_buckets must be None or whole numbers of at least 1, ascending, got {sizes}")

    def length(self, count: int) -> int:
        """Returns the padded length of a whole prompt."""
        fitting = (size for size in self.lengths or () if size >= count)
        return next(fitting, _fine_bucket(count))

    def active(self, count: int) -> int:
        """Returns the padded number of active tokens; a few (a question over reused chunks) are padded less."""
        if self.lengths is not None and count > DOUBLED_UP_TO:  # finer sizes would multiply the programs
            return self.length(count)
        return min(self.length(count), small_bucket(count))


FINE_BUCKETS = Buckets()


def _fine_bucket(length: int) -> int:
    if length <= 8 * SMALL_STEP:
        return max(-(-length // SMALL_STEP), 1) * SMALL_STEP
    step = 2 ** (math.ceil(math.log2(length)) - 1) // STEPS_PER_OCTAVE
    return -(-length // step) * step


def small_bucket(count: int) -> int:
    """Returns the padded number of a few tokens: 32, 64, 128, 256, then two steps per octave.

    For forced tokens, few active ones, and chunks on the device. The steps are few, since each has programs of its own.
    """
    size = SMALLEST_BUCKET
    while size < count:
        if size >= DOUBLED_UP_TO and size * 3 // 2 >= count:
            return size * 3 // 2
        size *= 2
    return size


def buckets_up_to(bucket: Callable[[int], int], most: int) -> list[int]:
    """Returns the sizes that `bucket` gives for 1 … `most`, ascending."""
    sizes: list[int] = []
    while not sizes or sizes[-1] < most:
        sizes.append(bucket(sizes[-1] + 1 if sizes else 1))
    return sizes
