"""Compares a GGUF file as it is loaded here with transformers + torch reading the same file.

`reference FILE OUT` needs torch, transformers, gguf and accelerate, and none of this package; `compare FILE OUT`
reads what it wrote. They may run in different environments. `load FILE` times loading, and measures its memory (Linux).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

LENGTHS = (17, 200, 700)
TEXTS = [
    "Hello  world 12345\n\n  naïve 日本語 🙂 ▁▁ x",
    "<|im_start|>user\nhi<|im_end|>",
    "It's 3.14159 or 1,000,000 — isn't it?\tTabs\r\n\r\nÀé e\u0301 ﬁ",
    "",
    " lead",
    "trail  ",
    "def f(x):\n    return x**2\n\n\n# ok",
    "Привет мир, как дела? مرحبا हिन्दी 한국어 ไทย",
    "\u200bzero\u00a0nbsp 𝔘𝔫𝔦 👩‍👩‍👧‍👦",
    "<start_of_turn>user\nq<end_of_turn>\n<unused3><table>",
]
CHAT = [{"role": "user", "content": "What is in chunk 12?"}]


def token_ids(tokenizer) -> list[list[int]]:
    ids = [tokenizer.encode(text) for text in TEXTS]
    if tokenizer.chat_template:
        ids.append(tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False))
    return ids


def reference(path: Path, out: Path) -> None:
    """Writes logits and token ids as transformers has them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    print(f"loaded in {time.perf_counter() - began:.1f} s")
    vocabulary = model.config.vocab_size
    prompt = np.random.default_rng(0).integers(vocabulary // 100, vocabulary - vocabulary // 40, max(LENGTHS))
    with torch.no_grad():
        logits = model(torch.tensor(prompt)[None]).logits[0].numpy()
    rows = {f"logits_{length}": logits[length - 1] for length in LENGTHS}
    texts = {f"ids_{number}": np.asarray(ids, np.int64) for number, ids in enumerate(token_ids(tokenizer))}
    np.savez(out, prompt=prompt, **rows, **texts)


def compare(path: Path, out: Path) -> None:
    """Prints how far this package's logits and ids are from those."""
    import cacheblend_jax as cb

    wanted = np.load(out)
    began = time.perf_counter()
    model = cb.load_model(path, dtype="float32")
    print(f"loaded in {time.perf_counter() - began:.1f} s")
    engine = cb.Engine(model)
    for length in LENGTHS:
        prompt = cb.Prompt(prefix=[], suffix=wanted["prompt"][:length])
        logits, theirs = np.asarray(engine.prefill(prompt, "full").logits), wanted[f"logits_{length}"]
        print(f"{length} tokens: largest difference {np.abs(logits - theirs).max():.2g}, ", end="")
        print(f"logits between {theirs.min():.1f} and {theirs.max():.1f}")
    ours = token_ids(model.tokenizer)
    same = sum(ids == wanted[f"ids_{number}"].tolist() for number, ids in enumerate(ours))
    print(f"token ids equal in {same} of {len(ours)} texts")


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def load(path: Path, _: None) -> None:
    """Prints how long loading takes, and how much memory; imports are not counted."""
    import jax
    from transformers import PreTrainedTokenizerFast  # noqa: F401 (imported when it is first asked for)

    import cacheblend_jax as cb

    jax.block_until_ready(jax.numpy.zeros(8) + 1)
    before, began = peak_bytes(), time.perf_counter()
    model = cb.load_model(path, dtype="float32")
    seconds = time.perf_counter() - began
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    print(f"loaded in {seconds:.1f} s; peak memory {(peak_bytes() - before) / weights:.2f} times the weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=("reference", "compare", "load"))
    parser.add_argument("gguf", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parsed = parser.parse_args()
    if parsed.out is None and parsed.work != "load":
        parser.error("OUT is missing")
    {"reference": reference, "compare": compare, "load": load}[parsed.work](parsed.gguf, parsed.out)


if __name__ == "__main__":
    main()
