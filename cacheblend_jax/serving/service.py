"""What the server's endpoints share: the engine, the scheduler, who may ask, and the threads that block."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from cacheblend_jax.engine.answer import wake
from cacheblend_jax.engine.engine import Engine
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.serving.health import Health
from cacheblend_jax.serving.metrics import Metrics
from cacheblend_jax.serving.options import ServingOptions
from cacheblend_jax.serving.precompute_calls import PrecomputeCalls
from cacheblend_jax.serving.requests import RequestReader
from cacheblend_jax.serving.scheduling import Scheduling
from cacheblend_jax.serving.tenants import Tenants
from cacheblend_jax.store import TenantStore

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
THREADS = 8  # that tokenise and submit
WATCHERS = 2  # that tell of health and metrics


class Service:
    """One server's state.

    Args:
        engine: over a `TenantStore`; `close` closes both.
        scheduler: answers prompts with this engine; `close` closes it.

    Attributes:
        is_closed: whether `close` has come to its end.

    Raises:
        CacheBlendError: the engine's store is another one, or its model has no tokenizer.
    """

    def __init__(self, engine: Engine, scheduler: Scheduling, options: ServingOptions, tenants: Tenants) -> None:
        if not isinstance(engine.store, TenantStore):
            raise CacheBlendError("a server needs an engine over a TenantStore: Engine(model, TenantStore(store))")
        if engine.model.tokenizer is None:
            raise CacheBlendError(f"model {engine.model.name!r} has no tokenizer; a server needs one")
        self.engine, self.scheduler, self.options, self.tenants = engine, scheduler, options, tenants
        self.store: TenantStore = engine.store
        self.health = Health(self.store)
        self.metrics = Metrics(scheduler, self.store, self.health)
        self.reader = RequestReader(options, engine.model.tokenizer, engine.blend, engine.model.config.max_positions)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="cacheblend-serve")
        self._watching = ThreadPoolExecutor(WATCHERS, thread_name_prefix="cacheblend-watch")
        self.precomputes = PrecomputeCalls()
        self.is_closed = False

    async def in_thread(
        self,
        work: Callable[[], Result],
        unwanted: Callable[[Result], object] | None = None,
        until: Callable[[Result, Callable[[], None]], object] | None = None,
    ) -> Result:
        """Runs what blocks in a thread.

        Args:
            unwanted: called with the result where nobody waits for it any more.
            until: called with the result, in the thread, and with what wakes the caller, which nothing else does then
                unless the work fails: each time that the event loop wakes, the threads wait for the interpreter.
        """
        loop = asyncio.get_running_loop()
        sleeper = loop.create_future()

        def run() -> Result:
            result = work()
            if until is not None:
                until(result, partial(wake, loop, sleeper))
            return result

        future = self._threads.submit(run)
        has_failed = lambda done: done.cancelled() or done.exception() is not None  # noqa: E731
        future.add_done_callback(lambda done: wake(loop, sleeper) if until is None or has_failed(done) else None)
        try:
            await sleeper
        except asyncio.CancelledError:
            if unwanted is not None:
                future.add_done_callback(lambda done: _give_up(done, unwanted))
            raise
        return future.result()  # is there, or a few steps of the thread away

    async def watched(self, work: Callable[[], Result]) -> Result:
        """Runs what operators ask for, in threads of its own: they are told also while requests take all others."""
        return await asyncio.wrap_future(self._watching.submit(work))

    def close(self) -> None:
        """Finishes what runs, writes what is to be stored, and closes everything, within half of `stop_s` seconds.

        The other half the connections had. What takes longer is left: `is_closed` is false then.
        """
        self.health.stopping()
        ended, within_s = threading.Event(), self.options.stop_s / 2

        def close() -> None:
            try:
                self.scheduler.close(within_s / 2)
                self.precomputes.close()
                self._threads.shutdown()
                self._watching.shutdown()
                self.engine.close()
                self.store.close()
            except Exception:
                logger.exception("the server could not be closed in order")
            finally:
                ended.set()

        threading.Thread(target=close, name="cacheblend-close", daemon=True).start()
        self.is_closed = ended.wait(within_s)
        if not self.is_closed:
            logger.error("not everything was written within %g s; what was not is computed anew", within_s)


def _give_up(done: Future[Result], unwanted: Callable[[Result], object]) -> None:
    if not done.cancelled() and done.exception() is None:
        unwanted(done.result())
