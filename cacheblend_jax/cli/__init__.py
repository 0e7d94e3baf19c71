"""The command line: `cacheblend-jax` and its commands, one file each."""
