"""`python -m cacheblend_jax` is the command line."""

import sys

from cacheblend_jax.cli import main

sys.exit(main())
