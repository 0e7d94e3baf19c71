"""Padded lengths: prompts whose lengths fall into one bucket share their compiled programs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from cacheblend_jax.errors import CacheBlendError

SMALL_STEP = 128  # lengths up to 1024 are padded to a multiple of this
STEPS_PER_OCTAVE = 32  # above: at most 1/32 is padding
SMALLEST_FORCED = 32
FEW = 256


@dataclass(frozen=True)
class Buckets:
    """Pads lengths.

    Attributes:
        lengths: ascending sizes to pad to, few of them for few programs; `None`: multiples of 128 up to 1024, then 32
            steps an octave (at most 3.1 % padding). Longer ones than the last are padded as without sizes.
    """

    lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        sizes = self.lengths
        if sizes is not None and (
            not sizes
            or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes)
            or list(sizes) != sorted(set(sizes))
        ):
            raise CacheBlendError(f"length_buckets must be None or whole numbers of at least 1, ascending, got {sizes}")

    def length(self, count: int) -> int:
        """Returns the room for a whole prompt's tokens."""
        fitting = (size for size in self.lengths or () if size >= count)
        return next(fitting, _fine_bucket(count))

    def active(self, count: int) -> int:
        """Returns the room for active tokens: few of them, a question over reused chunks, get less than a length."""
        if self.lengths is not None and count > FEW:  # sizes of their own would multiply the programs
            return self.length(count)
        return min(self.length(count), forced_bucket(count))


FINE_BUCKETS = Buckets()


def _fine_bucket(length: int) -> int:
    if length <= 8 * SMALL_STEP:
        return max(-(-length // SMALL_STEP), 1) * SMALL_STEP
    step = 2 ** (math.ceil(math.log2(length)) - 1) // STEPS_PER_OCTAVE
    return -(-length // step) * step


def forced_bucket(count: int) -> int:
    """Returns the room for forced tokens: 32, 64, 128, 256, then two steps an octave.

    Few steps, since each one is a program of its own; exact where questions usually are.
    """
    size = SMALLEST_FORCED
    while size < count:
        if size >= FEW and size * 3 // 2 >= count:
            return size * 3 // 2
        size *= 2
    return size


def buckets_up_to(bucket: Callable[[int], int], most: int) -> list[int]:
    """Returns the sizes that `bucket` gives for 1 … `most`, ascending."""
    sizes: list[int] = []
    while not sizes or sizes[-1] < most:
        sizes.append(bucket(sizes[-1] + 1 if sizes else 1))
    return sizes
