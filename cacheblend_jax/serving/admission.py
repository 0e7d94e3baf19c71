"""What is refused before any endpoint sees it: requests beyond a bound, and those that ask for another host."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from cacheblend_jax.serving.errors import ApiError

PORT = re.compile(r":\d*$")


class Admission:
    """Bounds how many requests are under way, those that are being sent to their clients included.

    Health and metrics are always answered.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most, self._under_way = app, most, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            return await self._app(scope, receive, send)
        if self._under_way >= self._most:
            options: dict[str, Any] = {"kind": "rate_limit_error", "code": "too_many_requests"}
            busy = ApiError(429, f"{self._most} requests are under way; try again later", **options)
            return await JSONResponse(busy.body, 429, {"Retry-After": "1"})(scope, receive, send)
        self._under_way += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._under_way -= 1


class HostCheck:
    """Refuses requests to a host that is not one of these names.

    A web page whose own name was made to point to this machine (DNS rebinding) counts, for the browser, as a page of
    this server: where no key is asked for, the name that it asks for is all that gives it away.

    Args:
        hosts: names and addresses without port, in lower case; IPv6 in brackets. `None`: all are answered.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] == "http" and self._hosts is not None:
            asked = PORT.sub("", Request(scope).headers.get("host", "")).lower().rstrip(".")
            if asked and asked not in self._hosts:  # browsers always name one
                message = (
                    f"this server answers as {' or '.join(self._hosts)} alone; ask it so, or start it with --api-key"
                )
                error = ApiError(403, message, code="unknown_host")
                return await JSONResponse(error.body, error.status)(scope, receive, send)
        return await self._app(scope, receive, send)
