"""`python -m cacheblend_jax` is the command line."""

import sys

from cacheblend_jax.cli.main import main

sys.exit(main())
