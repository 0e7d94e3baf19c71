"""The server as an ASGI application: its endpoints, and what holds for all of them."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from cacheblend_jax.engine.engine import Engine
from cacheblend_jax.errors import SchedulerClosed
from cacheblend_jax.serving import chunks
from cacheblend_jax.serving.admission import Admission, HostCheck
from cacheblend_jax.serving.answers import RunningAnswer, ended
from cacheblend_jax.serving.connection import ClientGoneError, body_of, while_connected
from cacheblend_jax.serving.errors import ApiError, api_error, stopping
from cacheblend_jax.serving.fields import Fields, parsed_json
from cacheblend_jax.serving.forms import CHAT, COMPLETION, Form, answer_events, event, whole_answer
from cacheblend_jax.serving.metrics import CONTENT_TYPE, Metrics
from cacheblend_jax.serving.options import ServingOptions
from cacheblend_jax.serving.scheduling import Scheduling
from cacheblend_jax.serving.service import Service
from cacheblend_jax.serving.tenants import Caller, Tenants

logger = logging.getLogger(__name__)
GONE = 499  # in logs and metrics: nobody reads the answer
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
EVENT_HEADERS = [
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
    (b"content-type", b"text/event-stream; charset=utf-8"),
]
Handler = Callable[[Request], Awaitable[Response]]


def make_app(
    engine: Engine,
    scheduler: Scheduling,
    options: ServingOptions | None = None,
    tenants: Tenants | None = None,
    *,
    warm_up: Callable[[], object] | None = None,
) -> Starlette:
    """Returns the application that answers OpenAI's clients: what `cacheblend-jax serve` runs.

    When it shuts down, it closes scheduler, engine and store; see `ServingOptions.stop_s`.

    Args:
        engine: over a `TenantStore`.
        scheduler: answers prompts with this engine.
        options: names, defaults and bounds.
        tenants: who may ask; `None`: everyone, without a key.
        warm_up: called in a thread when the application starts: it is ready after that.

    Raises:
        CacheBlendError: the engine's store is no `TenantStore`, or its model has no tokenizer.
    """
    service = Service(engine, scheduler, options or ServingOptions(), tenants or Tenants())
    app = Starlette(routes=_routes(service), lifespan=partial(_lifespan, service, warm_up))
    app.state.service = service
    app.add_exception_handler(HTTPException, _unknown_path)
    app.add_middleware(Admission, most=service.options.bounds.requests)
    app.add_middleware(HostCheck, hosts=service.options.hosts)
    return app


def _routes(service: Service) -> list[Route]:
    def route(path: str, handler: Callable[[Service, Request], Awaitable[Response]], *methods: str) -> Route:
        endpoint = _Endpoint(path, partial(handler, service), service.metrics)
        return Route(path, endpoint, methods=list(methods) or ["GET"])

    return [
        route("/v1/chat/completions", partial(_answer, form=CHAT), "POST"),
        route("/v1/completions", partial(_answer, form=COMPLETION), "POST"),
        route("/v1/models", _models),
        route("/v1/models/{model:path}", _models),
        route("/v1/chunks", _chunks, "GET", "POST"),
        route("/v1/chunks/lookup", _look_up, "POST"),
        route("/v1/chunks/{key}", _chunk, "GET", "DELETE"),
        route("/v1/chunks/{key}/pin", _pin, "POST", "DELETE"),
        route("/health", _health),
        route("/health/live", _live),
        route("/metrics", _metrics),
        route("/", _page),
    ]


@asynccontextmanager
async def _lifespan(service: Service, warm_up: Callable[[], object] | None, _: Starlette) -> AsyncIterator[None]:
    warming = asyncio.create_task(_warm_up(service, warm_up))
    yield
    warming.cancel()
    await asyncio.to_thread(service.close)


async def _warm_up(service: Service, warm_up: Callable[[], object] | None) -> None:
    if warm_up is not None:
        try:
            await service.in_thread(warm_up)
        except Exception:  # costs the first requests their time, no answer
            logger.exception("warming up failed; requests compile what they need")
    service.health.warmed_up()


# --- endpoints -------------------------------------------------------------------------------------------------------


async def _answer(service: Service, request: Request, *, form: Form) -> Response:
    caller = _caller(service, request)
    if service.health.is_stopping:
        raise stopping()
    raw, model = await body_of(request, service.options.bounds), service.options.model_name
    read = service.reader.chat if form.is_chat else service.reader.completion
    try:
        running = await while_connected(
            request.receive, RunningAnswer.submitted(service, lambda: read(parsed_json(raw), caller.tenant))
        )
    except SchedulerClosed:
        service.health.stopping()  # requests should be sent elsewhere
        raise
    if running.request.stream:
        return EventStream(running, answer_events(form, running, model), service.options.bounds.write_s)
    return JSONResponse(await while_connected(request.receive, whole_answer(form, running, model)))


async def _models(service: Service, request: Request) -> Response:
    _caller(service, request)
    name = service.options.model_name
    model = {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "cacheblend-jax",
        "max_model_len": service.engine.model.config.max_positions,
    }
    asked = request.path_params.get("model")
    if asked is None:
        return JSONResponse({"object": "list", "data": [model]})
    if asked != name:
        raise ApiError(404, f"there is no such model; the one here is {name!r}", code="model_not_found", param="model")
    return JSONResponse(model)


async def _chunks(service: Service, request: Request) -> Response:
    caller = _caller(service, request)
    if request.method != "POST":
        query = dict(request.query_params)
        return JSONResponse(await service.in_thread(lambda: chunks.listed(service, caller.tenant, query)))
    raw = await body_of(request, service.options.bounds)

    def compute() -> dict[str, Any]:
        body = parsed_json(raw)
        return chunks.precomputed(service, service.reader.chunks(body, caller.tenant), pin=Fields(body).flag("pin"))

    computed = service.precomputes.run(caller.tenant, compute)
    return JSONResponse(await while_connected(request.receive, computed))


async def _look_up(service: Service, request: Request) -> Response:
    caller = _caller(service, request)
    raw = await body_of(request, service.options.bounds)

    def look_up() -> dict[str, Any]:
        prompt = service.reader.chunks(parsed_json(raw), caller.tenant)
        return chunks.looked_up(service.engine, service.store, prompt)

    return JSONResponse(await service.in_thread(look_up))


async def _chunk(service: Service, request: Request) -> Response:
    caller, key = _caller(service, request), request.path_params["key"]
    work = chunks.deleted if request.method == "DELETE" else chunks.described  # HEAD comes with GET
    return JSONResponse(await service.in_thread(lambda: work(service, caller.tenant, key)))


async def _pin(service: Service, request: Request) -> Response:
    caller, key = _caller(service, request), request.path_params["key"]
    work = chunks.pinned if request.method == "POST" else chunks.unpinned
    return JSONResponse(await service.in_thread(lambda: work(service, caller.tenant, key)))


async def _health(service: Service, _: Request) -> Response:
    report = await service.watched(service.health.report)
    return JSONResponse(report, 200 if service.health.is_ready else 503)


async def _live(_: Service, __: Request) -> Response:
    return JSONResponse({"status": "live"})


async def _metrics(service: Service, request: Request) -> Response:
    if not _caller(service, request).is_operator:
        raise ApiError(403, "this key may not see /metrics: they count all tenants", code="not_an_operator")
    return Response(await service.watched(service.metrics.text), headers={"Content-Type": CONTENT_TYPE})


async def _page(_: Service, __: Request) -> Response:
    page = (files("cacheblend_jax.serving") / "page.html").read_text(encoding="utf-8")
    return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY})


def _caller(service: Service, request: Request) -> Caller:
    return service.tenants.caller(request.headers.getlist("authorization"))


# --- what holds for all ----------------------------------------------------------------------------------------------


class _Endpoint:
    """Turns whatever a handler raises into an answer, counts it, and logs it without anything that the client wrote."""

    def __init__(self, path: str, handler: Handler, metrics: Metrics) -> None:
        self._path, self._handler, self._metrics = path, handler, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        request, began, code = Request(scope, receive, send), time.perf_counter(), ""
        try:
            response = await self._handler(request)
        except ClientGoneError:
            response = Response(status_code=GONE)
        except (Exception, asyncio.CancelledError) as error:  # cancelled: the server has to end now
            answer = ended() if isinstance(error, asyncio.CancelledError) else _told(error)
            code = f" {answer.code}" if answer.code else ""
            response = JSONResponse(answer.body, answer.status, headers=answer.headers)
        took, status = time.perf_counter() - began, response.status_code
        # Once the response, or a stream's first event, is sent: it does not wait for this.
        asyncio.get_running_loop().call_soon(self._count, request.method, status, code, took)
        await response(scope, receive, send)

    def _count(self, method: str, status: int, code: str, took_s: float) -> None:
        self._metrics.requests.labels(self._path, str(status)).inc()
        logger.info("%s %s %d%s in %.0f ms", method, self._path, status, code, took_s * 1e3)


def _told(error: Exception) -> ApiError:
    """Returns what a client is told of an error; logs where one came from that nobody expected."""
    answer = api_error(error)
    if answer.status == 500:  # its message may hold the client's text
        origin = error.__cause__ or error
        logger.error("%s:\n%s", type(origin).__name__, "".join(traceback.format_tb(origin.__traceback__)))
    return answer


async def _unknown_path(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    message = f"{request.method} does not go with this path" if status == 405 else "there is no such path"
    answer = ApiError(status, message, code="unknown_url")
    return JSONResponse(answer.body, status, headers=getattr(error, "headers", None))


class EventStream(Response):
    """Sends an answer's events as they come; what fails then is the last event.

    Args:
        write_s: seconds until the client must have taken an event.
    """

    def __init__(self, running: RunningAnswer, events: AsyncGenerator[bytes, None], write_s: float) -> None:
        self.status_code, self.raw_headers = 200, list(EVENT_HEADERS)
        self._running, self._events, self._write_s = running, events, write_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends them, until the end or until the client has gone."""
        try:
            await while_connected(receive, self._send_all(send))
        except (ClientGoneError, TimeoutError):
            logger.info("%s: the client has gone", scope["path"])
        finally:
            self._running.cancel()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            try:
                async for each in events:
                    await self._send(send, each)
            except TimeoutError:
                raise
            except Exception as error:
                await self._send(send, event(_told(error).body))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, body: bytes) -> None:
        async with asyncio.timeout(self._write_s):
            await send({"type": "http.response.body", "body": body, "more_body": True})
