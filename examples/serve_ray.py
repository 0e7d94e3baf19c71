"""Many replicas of `cacheblend-jax serve` under Ray Serve, over one store: `serve run serve_ray:app store=kv/`.

Each replica holds the whole model. The front, which clients talk to, sends a request to the replica that has its chunks
in memory; the others find them in the store. Needs `pip install 'cacheblend-jax[ray]'`; see docs/guide/serving.md.
"""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

import cacheblend_jax as cb
from cacheblend_jax.serving import Bounds, ServingOptions, Tenants, chunk_weights, make_app, ranked
from cacheblend_jax.store import TenantStore

ATTEMPTS = 5  # replicas that may die, one after the other, before they answer a request
STOP_S = 30.0  # for a replica to finish what it runs, and write what is to be stored


class Settings(BaseModel):
    """What `serve run serve_ray:app` takes, each as `name=value`.

    Attributes:
        store: a directory on this machine, or object storage.
        model: as `cacheblend-jax serve --model`, and every replica's machine must have it.
        keys: a file as of `--keys`; without it, whoever reaches the port may ask.
        slots: answers that a replica decodes together.
        slot_tokens: of a prompt with its answer.
        waiting: requests that may wait for a replica.
        warm_up: a replica is ready once the programs for all prompts of up to so many tokens are compiled.
        min_replicas, max_replicas: between which Ray Serve chooses by how many requests there are.
        cpus, gpus: that a replica reserves.
    """

    store: str
    model: str = "demo"
    keys: str | None = None
    slots: int = 8
    slot_tokens: int = 2048
    waiting: int = 64
    warm_up: int = 0
    min_replicas: int = 1
    max_replicas: int = 4
    cpus: float = 1
    gpus: float = 0


@dataclass(frozen=True)
class Call:
    """A request on its way from the front to a replica."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @property
    def scope(self) -> dict:
        """The request as ASGI describes it."""
        where = {"method": self.method, "path": self.path, "query_string": self.query, "headers": self.headers}
        return {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "root_path": "", **where}


class ChunkRouter(RequestRouter):
    """Sends a request to the replica that its chunks belong to, or, while that one's slots are full, to the next."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Returns replicas in the order in which they should be tried; those in one list by how busy they are."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # where all are full: wait before trying again
        weights = pending_request.kwargs["weights"]
        if not weights:
            return [candidate_replicas]
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[by_name[name]] for name in ranked(weights, by_name)]


@serve.deployment
class Replica:
    """The application of `cacheblend-jax serve`, without a port."""

    def __init__(self, settings: Settings) -> None:
        self._app = replica_app(settings)
        self._name = serve.get_replica_context().replica_id.unique_id.encode()

    async def answer(self, call: Call, weights: dict[str, int]) -> AsyncGenerator[dict, None]:
        """Yields what the application sends, as it sends it.

        Args:
            weights: for the router.
        """
        sent: asyncio.Queue[dict | None] = asyncio.Queue()
        given = [{"type": "http.request", "body": call.body, "more_body": False}]

        async def receive() -> dict:
            if given:
                return given.pop()
            return await asyncio.Future()  # a client that goes has this call cancelled

        running = asyncio.create_task(self._app(call.scope, receive, sent.put))
        running.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while (message := await sent.get()) is not None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"x-replica", self._name)]
                yield message
            running.result()
        finally:
            running.cancel()

    def __del__(self) -> None:
        """Finishes what runs, and writes what is to be stored."""
        app = getattr(self, "_app", None)
        if app is not None and not app.state.service.is_closed:
            app.state.service.close()


def replica_app(settings: Settings) -> Starlette:
    """Loads the model, compiles what requests need, and returns the application: Serve then takes it for ready."""
    tenants = Tenants() if settings.keys is None else Tenants.from_file(settings.keys)
    model = cb.load_model(settings.model)
    # Pins are one process's, and a client cannot choose which replica it asks.
    store = TenantStore(cb.ChunkStore(settings.store), tenants.quotas, pinned_bytes=0)
    engine = cb.Engine(model, store)
    longest = min(settings.slot_tokens, model.config.max_positions)
    scheduler = cb.Scheduler(engine, slots=settings.slots, max_tokens=longest)
    scheduler.warmup()  # first: it must come before any request
    if settings.warm_up:
        engine.warmup(settings.warm_up)
    scheduler.submit(cb.Prompt("", (), "a"), mode="full", max_new_tokens=2).result()
    app = make_app(engine, scheduler, ServingOptions(Path(settings.model).name, stop_s=STOP_S), tenants)
    app.state.service.health.warmed_up()
    return app


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
class Front:
    """Passes requests to replicas, and answers back; of a replica that dies, the request to another."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas.options(stream=True)

    async def __call__(self, request: Request) -> Response:
        """Answers a request."""
        if request.url.path == "/metrics":
            return refusal(404, "each replica counts for itself; Ray's own metrics are those of all", "unknown_url")
        body = await body_of(request, Bounds().body_bytes)
        if body is None:
            return refusal(413, f"the body has more than {Bounds().body_bytes} bytes", "request_too_large")
        call = Call(request.method, request.url.path, request.scope["query_string"], request.headers.raw, body)
        for _ in range(ATTEMPTS):
            try:
                return await self._answer(call)
            except RayActorError:  # nothing of the answer was sent yet
                continue
            except BackPressureError:
                return refusal(429, "too many requests wait already; try again later", "queue_full")
        return refusal(503, f"{ATTEMPTS} replicas ended before they answered", "cancelled")

    async def _answer(self, call: Call) -> Response:
        messages = self._messages(call)
        start = await anext(messages)
        if dict(start["headers"]).get(b"content-type", b"").startswith(b"text/event-stream"):  # redirects have none
            response: Response = StreamingResponse(events(await anext(messages), messages), start["status"])
        else:
            response = Response(b"".join([each["body"] async for each in messages]), start["status"])
        response.raw_headers = start["headers"]
        return response

    async def _messages(self, call: Call) -> AsyncGenerator[dict, None]:
        answer = self._replicas.answer.remote(call, weights=chunk_weights(call.body))
        try:
            async for message in answer:
                yield message
        finally:
            answer.cancel()


async def body_of(request: Request, most: int) -> bytes | None:
    """Returns a request's body; `None` if it is too large."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            return None
        parts.append(part)
    return b"".join(parts)


async def events(first: dict, rest: AsyncGenerator[dict, None]) -> AsyncGenerator[bytes, None]:
    """Yields a stream's bytes; the last event says so if the replica dies: a client may have read half an answer."""
    yield first["body"]
    try:
        async for message in rest:
            yield message["body"]
    except RayActorError:
        error = refusal(503, "the replica ended; send the request again", "cancelled")
        yield b"data: " + error.body + b"\n\n"


def refusal(status: int, message: str, code: str) -> JSONResponse:
    """Returns an error as OpenAI's clients read it."""
    kind = {413: "invalid_request_error", 404: "invalid_request_error", 429: "rate_limit_error"}.get(status)
    return JSONResponse(
        {"error": {"message": message, "type": kind or "server_error", "param": None, "code": code}}, status
    )


def app(settings: Settings) -> Application:
    """Returns what `serve run` and `serve deploy` run."""
    replicas = Replica.options(
        max_ongoing_requests=settings.slots,
        max_queued_requests=settings.waiting,
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": max(1, settings.slots * 3 // 4),
        },
        request_router_config=RequestRouterConfig(request_router_class=ChunkRouter),
        graceful_shutdown_timeout_s=2 * STOP_S,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
    )
    return Front.bind(replicas.bind(settings))
