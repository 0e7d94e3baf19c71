"""The peer: the same model by transformers and torch, to time beside ours."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from cacheblend_jax.engine.prompt import Prompt
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.model import Model, ModelConfig
from cacheblend_jax.model.tensor_names import hugging_face_tensors


def torch_model(config: ModelConfig, device: str) -> Any:
    """Returns the model by transformers and torch on a device of torch's, with random weights.

    Its attention is torch's own, or transformers', where scores are capped or heads have sinks: torch's has neither.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = getattr(torch, config.dtype)
    attention = "sdpa" if config.attention_soft_cap is None and not config.attention_sinks else "eager"
    peer_config = AutoConfig.for_model(**config.to_hugging_face())
    with torch.device(device):
        return AutoModelForCausalLM.from_config(peer_config, dtype=dtype, attn_implementation=attention).eval()


def check_peer(model: Model) -> None:
    """Checks that `torch_prefill` can run a model.

    Raises:
        CacheBlendError: torch is missing, or the model is a mixture of experts, which transformers holds in another
            form.
    """
    if model.config.num_experts:
        raise CacheBlendError(
            f"--peer torch times dense models, and {model.name} has {model.config.num_experts} experts a layer: "
            "leave --peer out"
        )
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise CacheBlendError(f"--peer torch needs torch: pip install torch ({error})") from error


def torch_prefill(model: Model, prompt: Prompt, next_token: int) -> Callable[[], float]:
    """Returns a full prefill by torch of the same weights and prompt, on its GPU or its threads, ready to be timed.

    Args:
        prompt: in token ids.
        next_token: what our full prefill gives; in float32, torch must give the same.

    Returns:
        A function that runs the prefill and returns its time to first token in seconds.

    Raises:
        CacheBlendError: torch's next token is not ours.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    peer = torch_model(model.config, device)
    tensors = {
        name: torch.from_numpy(array.astype(np.float32)).to(peer.dtype)
        for name, array in hugging_face_tensors(model.params, model.config).items()
    }
    peer.load_state_dict(tensors, strict=not model.config.tied_embeddings)
    parts = [np.asarray(part) for part in (prompt.prefix, *prompt.chunks, prompt.suffix)]
    ids = torch.from_numpy(np.concatenate(parts).astype(np.int64)[None])

    @torch.no_grad()
    def first_token() -> int:
        out = peer(ids.to(device), use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())

    def ttft_s() -> float:
        began = time.perf_counter()
        first_token()
        return time.perf_counter() - began

    token = first_token()
    if model.config.dtype == "float32" and token != next_token:
        raise CacheBlendError(f"torch's next token is {token}, ours {next_token}: the two do not compute the same")
    return ttft_s
