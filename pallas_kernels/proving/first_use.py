"""Verdicts where they are first needed: those in use, else those remembered, else new ones."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from pallas_kernels.proving.identity import Place
from pallas_kernels.proving.prove import UnprovenError, prove, trials_on
from pallas_kernels.proving.remembered import recall, remember
from pallas_kernels.target import Device, target_of
from pallas_kernels.verdicts import Kind, Trial, Verdicts, use_verdicts, verdicts_in_use, verdicts_on

logger = logging.getLogger(__name__)
BY_HAND = "python -m pallas_kernels.proving"

_lock = threading.Lock()  # one proof at a time: others would disturb its measurements


def use_verdicts_on(device: Device, kind: Kind, proof: Callable[[Place, Sequence[Trial]], Verdicts] = prove) -> None:
    """Sees to it that calls of a kind on a device are decided by verdicts: makes the trials that are not remembered.

    Never an error: where nothing can be proven, it warns, and this process takes XLA.

    Args:
        proof: what proves kernels.
    """
    target = target_of(device)
    with _lock:
        in_use = verdicts_on(target)
        wanted = trials_on(target, [kind])
        if not (in_use.lacking(wanted) if in_use else wanted):
            return
        place = Place.of(device)
        known = recall(place.identity) or Verdicts(target, place.identity)
        if in_use is not None:  # what programs were compiled by stays
            known = known.merged_with(in_use)
        if lacking := known.lacking(wanted):
            known = known.merged_with(_proven(place, kind, lacking, proof))
        use_verdicts(*verdicts_in_use(), known)


def _proven(
    place: Place, kind: Kind, trials: Sequence[Trial], proof: Callable[[Place, Sequence[Trial]], Verdicts]
) -> Verdicts:
    subject = f"the kernels on this {place.target.chip} for {kind.dtype} and head_dim {kind.head_dim}"
    try:
        if place.target.platform == "tpu":
            by_hand = f"{BY_HAND} --dtypes {kind.dtype} --head-dims {kind.head_dim}"
            raise UnprovenError(f"no other process can open a TPU that this one uses; before it does, run: {by_hand}")
        logger.warning("checking and timing %s, once; that takes up to a minute", subject)
        verdicts = proof(place, trials)
    except Exception as error:  # kernels only make programs faster: no failure of their proof is an engine's
        logger.warning("%s are XLA's, the others are unproven: %s", subject, error)
        unproven = tuple(replace(trial, failure=f"unproven: {error}") for trial in trials)
        return Verdicts(place.target, place.identity, trials=unproven)  # for this process alone
    try:
        remember(verdicts)
    except OSError as error:
        logger.warning("what was found of the kernels can't be remembered, and each process will check anew: %s", error)
    return verdicts
