"""Counts the kernels that a program compiled for a GPU launches, by kind: the table in docs/kernels.md.

    python scripts/count_kernels.py blend.txt …

Each file is the optimised HLO of a program: `compiled.as_text()`, or what `Runner.texts` returns. Loops count once.
What libraries launch beside their kernels is not seen (cuBLAS clears a workspace, say).
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

LAUNCH = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*?) (fusion|custom-call|copy|fusion-start|copy-start|sort)\((.*)$")
# By what its line says, the first that matches: a target, a kernel's name, or the scope that it was traced in.
KINDS = {
    "products": r"__cublas|gemm_fusion",
    "attention": r'custom_call_target="mosaic_gpu|selective_attention_(mosaic_gpu|triton)',
    "blending": r"blend_kv_triton",
    "cached KV copied": r"jit\(dynamic_(update_)?index_in_dim\)",
    "attention's queries, keys, masks and output": r"/rope/|queries.*/concatenate|jit\(_pad\)|/selective_attention/",
    "fresh KV, cut out": r"/blend_kv/|/split",
    "norms": r"(queries|keys_values|logits|finish)/(convert_element_type|rsqrt|reduce_sum|square|jit\(square\))",
    "activations and sums": r"/finish/",
}
OTHER = "selection, embedding, logits"


def count_kernels(text: str) -> Counter[str]:
    """Returns how many kernels a program launches, by kind."""
    entry = text[text.index("\nENTRY") :]
    launches = [line for line in entry.splitlines() if LAUNCH.match(line)]
    return Counter(next((kind for kind, says in KINDS.items() if re.search(says, line)), OTHER) for line in launches)


def main(paths: list[str]) -> None:
    """Prints one column for each program."""
    counts = [count_kernels(Path(path).read_text()) for path in paths]
    for kind in (*KINDS, OTHER):
        print("|", " | ".join([kind, *(str(count[kind]) for count in counts)]), "|")
    print("|", " | ".join(["all", *(str(count.total()) for count in counts)]), "|")


if __name__ == "__main__":
    main(sys.argv[1:])
