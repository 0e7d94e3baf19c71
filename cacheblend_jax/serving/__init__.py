"""A server for OpenAI's clients: `make_app` is the application, `run_server` serves it. Needs the extra `serve`."""

from typing import TYPE_CHECKING

from cacheblend_jax.runtime.lazy_names import imported

if TYPE_CHECKING:
    from cacheblend_jax.serving.app import make_app
    from cacheblend_jax.serving.options import Bounds, ServingOptions
    from cacheblend_jax.serving.routing import chunk_weights, ranked
    from cacheblend_jax.serving.server import bound_socket, run_server
    from cacheblend_jax.serving.tenants import Caller, Tenants

__all__ = [
    "Bounds",
    "Caller",
    "ServingOptions",
    "Tenants",
    "bound_socket",
    "chunk_weights",
    "make_app",
    "ranked",
    "run_server",
]
_HOMES = ("options", "tenants", "routing", "app", "server")


def __getattr__(name: str) -> object:
    return imported(__name__, name, __all__, _HOMES)
