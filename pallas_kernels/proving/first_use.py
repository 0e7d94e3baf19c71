"""Verdicts where they are first needed: those in use, else those remembered, else new ones."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from pallas_kernels.proving.identity import Place
from pallas_kernels.proving.prove import UnprovenError, backends_to_try, prove
from pallas_kernels.proving.remembered import recall, remember
from pallas_kernels.target import Device, target_of
from pallas_kernels.verdicts import Verdicts, use_verdicts, verdicts_in_use, verdicts_on

logger = logging.getLogger(__name__)
BY_HAND = "python -m pallas_kernels.proving"

_lock = threading.Lock()  # one proof at a time: others would disturb its measurements


def use_verdicts_on(device: Device, proof: Callable[[Place], Verdicts] = prove) -> None:
    """Sees to it that calls on a device are decided by verdicts: proves its kernels where none are remembered.

    Never an error: where nothing can be proven, it warns, and this process takes XLA.

    Args:
        proof: what proves kernels.
    """
    target = target_of(device)
    with _lock:
        if verdicts_on(target) is not None:
            return
        place = Place.of(device)
        verdicts = recall(place.identity)
        if verdicts is None:
            verdicts = _proven(place, proof)
        use_verdicts(*verdicts_in_use(), verdicts)


def _proven(place: Place, proof: Callable[[Place], Verdicts]) -> Verdicts:
    if not backends_to_try(place.target):
        return Verdicts(place.target, place.identity)
    try:
        if place.target.platform == "tpu":
            raise UnprovenError(f"no other process can open a TPU that this one uses; before it does, run: {BY_HAND}")
        logger.warning("checking and timing the kernels on this %s, once; that takes minutes", place.target.chip)
        verdicts = proof(place)
    except Exception as error:  # kernels only make programs faster: no failure of their proof is an engine's
        logger.warning("the kernels on this %s are XLA's, the others are unproven: %s", place.target.chip, error)
        return Verdicts(place.target, place.identity)
    try:
        remember(verdicts)
    except OSError as error:
        logger.warning("what was found of the kernels can't be remembered, and each process will check anew: %s", error)
    return verdicts
