"""What the processes of a program on several hosts tell each other, so that each of them runs the same programs."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import jax

from cacheblend_jax.errors import CacheBlendError

Result = TypeVar("Result")
LISTENING_S = 0.5  # a host that waits for a program hears this often whether another has given up
_numbers = itertools.count()  # each process makes the same ones in the same order


class HostsError(CacheBlendError):
    """Another host failed, has ended, or is doing something else."""


class Hosts:
    """The processes that `jax.distributed.initialize` connected, as one of them sees the others.

    They talk through JAX's coordination service, not by a collective, so that no failure leaves one waiting for ever.
    Each process calls the same methods in the same order.

    Args:
        client: of the coordination service.
        index: which of the processes this is; the first one, 0, decides.
        count: how many there are.
        timeout_s: how long one waits for another.
        name: what they call this among themselves.
    """

    def __init__(self, client: Any, index: int, count: int, timeout_s: float, name: str) -> None:
        self._client, self.index, self.count, self._timeout_s = client, index, count, timeout_s
        self._name, self._round = f"cacheblend/{name}", 0
        self._failed: str | None = None

    def agree(self, call: str, report: Any, decide: Callable[[list[Any]], Any]) -> Any:
        """Returns what the first host decides, given all hosts' reports; every host calls this.

        Args:
            call: what this host is doing, which all must be.
            report: what this host says, as JSON holds it.
            decide: called on the first host with the reports in order; returns what JSON holds.

        Raises:
            HostsError: a host did not answer in time, is in another call, has given up, or could not decide.
        """
        if self._failed is not None:
            raise HostsError(self._failed)
        cause: Exception | None = None
        try:
            if self.index == 0:
                answer, cause = self._decided({"call": call, "report": report}, decide)
            else:
                answer = self._told({"call": call, "report": report})
        except jax.errors.JaxRuntimeError as error:
            raise self.broken(str(error).splitlines()[0]) from error
        self._round += 1
        if "error" in answer:
            raise HostsError(answer["error"]) from cause
        return answer["decision"]

    def give_up(self, error: BaseException) -> None:
        """Has the other hosts' next `agree`, which this one will not take part in, raise what has failed here."""
        if self._failed is not None:
            return
        try:
            answer = "decision" if self.index == 0 else str(self.index)
            self._client.key_value_set(self._key(answer), json.dumps(self._error(error)))
        except jax.errors.JaxRuntimeError as lost:
            self.broken(str(lost).splitlines()[0])
        self._round += 1

    def _decided(
        self, own: dict[str, Any], decide: Callable[[list[Any]], Any]
    ) -> tuple[dict[str, Any], Exception | None]:
        """As the first host: hears the others, and tells them what it decides; also returns why it could not."""
        heard = [own, *(self._get(str(index)) for index in range(1, self.count))]
        answer = next((each for each in heard if "error" in each), None) or _other_calls(heard)
        cause: Exception | None = None
        if answer is None:
            try:
                answer = {"decision": decide([each["report"] for each in heard])}
            except Exception as error:
                answer, cause = self._error(error), error
        text = json.dumps(answer)
        self._client.key_value_set(self._key("decision"), text)
        if self._round:  # all hosts have read what was decided then: they have reported since
            self._client.key_value_delete(f"{self._name}/{self._round - 1}/")
        return json.loads(text), cause  # what the others get: lists in the place of tuples, say

    def _told(self, own: dict[str, Any]) -> dict[str, Any]:
        self._client.key_value_set(self._key(str(self.index)), json.dumps(own))
        return self._get("decision")

    def _error(self, error: BaseException) -> dict[str, Any]:
        return {"error": f"host {self.index} of {self.count} failed: {type(error).__name__}: {error}"}

    def _get(self, name: str) -> dict[str, Any]:
        return json.loads(self._client.blocking_key_value_get(self._key(name), int(self._timeout_s * 1e3)))

    def _key(self, name: str) -> str:
        return f"{self._name}/{self._round}/{name}"

    def in_time(self, work: Callable[[], Result]) -> Result:
        """Returns what `work` returns, which waits for programs that all hosts run.

        Raises:
            HostsError: it has not ended in time, or another host has given up. Its thread waits on.
        """
        outcome: Future[Result] = Future()

        def run() -> None:
            try:
                outcome.set_result(work())
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=run, name="cacheblend-program", daemon=True).start()
        given_up_at = time.monotonic() + self._timeout_s
        while not wait([outcome], min(LISTENING_S, self._timeout_s)).done:
            if (error := self._heard_error()) is not None:
                raise self._apart(error)
            if time.monotonic() > given_up_at:
                raise self.broken("in a program that all hosts run")
        return outcome.result()

    def _heard_error(self) -> str | None:
        """Returns why another host has given up, if one that this one listens to has."""
        others = [str(index) for index in range(1, self.count) if index != self.index]
        for name in others if self.index == 0 else ["decision", *others]:
            try:
                if (error := json.loads(self._client.key_value_try_get(self._key(name))).get("error")) is not None:
                    return error
            except jax.errors.JaxRuntimeError:  # it has said nothing yet
                continue
        return None

    def broken(self, reason: str) -> HostsError:
        """Gives the other hosts up, since one is silent; returns the error that says so, as every later call does."""
        silent = f"one of {self.count} did not answer within {self._timeout_s:g} s ({reason})"
        return self._apart(f"{silent}; it has ended, or made other calls than this one")

    def _apart(self, why: str) -> HostsError:
        self._failed = f"the hosts no longer agree: {why}; restart all of them"
        return HostsError(self._failed)


def _other_calls(heard: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns the error that two hosts' calls differ, if they do."""
    own = heard[0]["call"]
    for index, each in enumerate(heard):
        if each["call"] != own:
            return {
                "error": f"the hosts make different calls: host 0 of {len(heard)} is in {own!r}, host {index} in "
                f"{each['call']!r}; all must call the same methods in the same order"
            }
    return None


def connected_hosts(timeout_s: float) -> Hosts:
    """Returns the processes that the program has; each of them calls this the same number of times."""
    from jax._src import distributed  # `jax.distributed` does not hand out the client that it has connected

    client = distributed.global_state.client
    return Hosts(client, jax.process_index(), jax.process_count(), timeout_s, str(next(_numbers)))
