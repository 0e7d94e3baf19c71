"""`python -m cacheblend_jax` is the command line."""

from cacheblend_jax.cli.process import run

run()
