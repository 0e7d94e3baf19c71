"""The engine: from a prompt to its blended KV cache and an answer."""

from cacheblend_jax.engine.answer import Answer
from cacheblend_jax.engine.contexts import neutral_text
from cacheblend_jax.engine.controller import Decision
from cacheblend_jax.engine.delays import Tier, cheapest_tier
from cacheblend_jax.engine.engine import Engine
from cacheblend_jax.engine.fitted_context import FittedContext
from cacheblend_jax.engine.generation import TokenStream
from cacheblend_jax.engine.profile import Profile
from cacheblend_jax.engine.prompt import Prompt
from cacheblend_jax.engine.results import Generation, PrefillResult, PrefillStats
from cacheblend_jax.engine.scheduler import Scheduler
from cacheblend_jax.engine.scheduling import SchedulerStats

__all__ = [
    "Answer",
    "Decision",
    "Engine",
    "FittedContext",
    "Generation",
    "PrefillResult",
    "PrefillStats",
    "Profile",
    "Prompt",
    "Scheduler",
    "SchedulerStats",
    "Tier",
    "TokenStream",
    "cheapest_tier",
    "neutral_text",
]
