"""Kernels prove themselves: on the device where they are to run, beside XLA, before anyone relies on them."""
