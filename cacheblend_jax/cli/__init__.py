"""The command line: `cacheblend-jax` and its commands, a file each, and what they share."""
