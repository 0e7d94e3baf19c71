"""What users choose by name. It stands apart from what the names stand for: a command's help needs no JAX."""

from __future__ import annotations

MODES = ("full", "prefix", "reuse", "blend")
EXECUTORS = ("auto", "resident", "streamed")
KERNELS = ("auto", "xla", "mosaic_gpu", "triton", "tpu", "pallas")
DEVICES = ("H100", "H200", "A100", "L4", "T4", "v5e", "v6e")  # that capacity is planned for
TIERS = ("device", "host", "nvme", "network", "object")  # likewise
BUILT_IN_SELECTORS = ("hkvd", "cross", "query", "epic", "random", "oracle")

# What chunks are precomputed after: nothing, the packaged text, or what a file of this name holds, fitted to a model.
PLAIN, NEUTRAL = "plain", "neutral"
FITTED_SUFFIX = ".safetensors"

# What settings are scored on, token by token: the greedy answer of full recompute, or the data's own.
CONTINUATIONS = ("full", "gold")
CONTINUATION_TOKENS = 24
SELECTORS_COMPARED = ("query", "hkvd", "random", "epic")
