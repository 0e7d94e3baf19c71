"""Counts the kernels that a program compiled for a GPU launches, and the bytes that they move: docs/kernels.md's table.

    python scripts/count_kernels.py blend.txt …

Each file is the optimised HLO of a program: `compiled.as_text()`, or what `Runner.texts` returns. Loops count once.
What libraries launch beside their kernels is not seen (cuBLAS clears a workspace, say). Bytes are those that a kernel
must read and write: of what it cuts or gathers rows out of, those alone. They are not counted for products and
attention, which take longer to compute than to move.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.blending.traffic import cost as blending_cost

INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
LAUNCHES = ("fusion", "custom-call", "copy", "fusion-start", "copy-start", "sort")
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
COMPUTED = ("products", "attention")  # their bytes are not what they take
PARTS = ("slice", "dynamic-slice", "gather")  # read a part of what they are given
DTYPES = {"pred": "bool", "s": "int", "u": "uint", "f": "float", "bf": "bfloat"}


class Instruction(NamedTuple):
    """A line of HLO: its name, the type of its result, what it does, and the names of what it reads."""

    name: str
    type: str
    does: str
    reads: list[str]
    line: str


def count_kernels(text: str) -> Counter[str]:
    """Returns how many kernels a program launches, by kind."""
    return Counter(kind_of(each.line) for each in launches(computations(text)))


def count_bytes(text: str) -> Counter[str]:
    """Returns the bytes that a program's kernels move, by kind; none for products and attention."""
    found, moved = computations(text), Counter[str]()
    types = {each.name: each.type for each in found["ENTRY"]}
    for launch in launches(found):
        if (kind := kind_of(launch.line)) not in COMPUTED:
            moved[kind] += bytes_of(launch, types, found)
    return moved


def computations(text: str) -> dict[str, list[Instruction]]:
    """Returns the instructions of each computation of a program, by its name; the program's own is `ENTRY`."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if line.endswith("{") and line.startswith(("%", "ENTRY")):
            name = "ENTRY" if line.startswith("ENTRY") else line[1 : line.index(" ")]
            current = found[name] = []
        elif match := INSTRUCTION.match(line):
            name, of_type, does, rest = match.groups()
            current.append(Instruction(name, of_type, does, re.findall(r"%([^\s,()]+)", rest.split("), ")[0]), line))
    return found


def launches(found: dict[str, list[Instruction]]) -> Iterable[Instruction]:
    """Yields the instructions of a program that launch kernels."""
    return (each for each in found["ENTRY"] if each.does in LAUNCHES)


def kind_of(line: str) -> str:
    """Returns the kind of kernel that a line launches."""
    return next((kind for kind, says in KINDS.items() if re.search(says, line)), OTHER)


def bytes_of(launch: Instruction, types: dict[str, str], found: dict[str, list[Instruction]]) -> int:
    """Returns the bytes that a kernel reads and writes."""
    if "blend_kv_triton" in launch.line:  # in place: of the caches it is given, a part
        _, k, _, fresh, _, cos, *_ = (_shape(types[name]) for name in launch.reads)
        declared: list[int] = []
        jax.eval_shape(lambda *of: declared.append(blending_cost(of[0], of[1][0], of[2]).bytes_accessed), k, fresh, cos)
        return declared[0]
    called = re.search(r"calls=%([^\s,]+)", launch.line)
    inside = found[called[1]] if called else []
    parameters = {
        int(each.line.split("parameter(")[1].split(")")[0]): each for each in inside if each.does == "parameter"
    }
    read = sum(
        _bytes_read(parameters[i], inside) if i in parameters else _num_bytes(types[name])
        for i, name in enumerate(launch.reads)
    )
    updates = [each for each in inside if each.does == "dynamic-update-slice"]
    if not updates:
        return read + _num_bytes(launch.type)
    of_inside = {each.name: each.type for each in inside}
    written = sum(_num_bytes(of_inside[each.reads[1]]) for each in updates)
    return written + read - sum(_num_bytes(of_inside[each.reads[0]]) for each in updates)


def _bytes_read(given: Instruction, inside: list[Instruction]) -> int:
    """Returns the bytes that a fusion reads of one array that it is given."""
    whole, users = _num_bytes(given.type), [each for each in inside if given.name in each.reads]
    if users and all(each.does == "bitcast" or (each.does in PARTS and each.reads[0] == given.name) for each in users):
        parts = (_bytes_read(each, inside) if each.does == "bitcast" else _num_bytes(each.type) for each in users)
        return min(whole, sum(parts))
    return whole


def _shapes(of_type: str) -> list[tuple[str, list[int]]]:
    found = re.findall(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]", of_type)
    return [(dtype, [int(size) for size in sizes.split(",") if size]) for dtype, sizes in found]


def _num_bytes(of_type: str) -> int:
    return sum(math.prod(sizes) * _dtype(name).itemsize for name, sizes in _shapes(of_type))


def _dtype(name: str) -> np.dtype:
    letters, bits, form = re.fullmatch(r"([a-z]+)(\d*)(\w*)", name).groups()
    return jnp.dtype(DTYPES[letters] + bits + (f"_{form}" if form else ""))  # float8_e4m3fn, say


def _shape(of_type: str) -> jax.ShapeDtypeStruct:
    ((name, sizes),) = _shapes(of_type)
    return jax.ShapeDtypeStruct(sizes, _dtype(name))


def main(paths: list[str]) -> None:
    """Prints two columns for each program: kernels, and megabytes."""
    texts = [Path(path).read_text() for path in paths]
    counts = [(count_kernels(text), count_bytes(text)) for text in texts]
    for kind in (*KINDS, OTHER):
        cells = [(str(kernels[kind]), f"{moved[kind] / 1e6:.0f}" if moved[kind] else "") for kernels, moved in counts]
        print("|", " | ".join([kind, *(cell for pair in cells for cell in pair)]), "|")
    totals = [(str(kernels.total()), f"{moved.total() / 1e6:.0f}") for kernels, moved in counts]
    print("|", " | ".join(["all", *(cell for pair in totals for cell in pair)]), "|")


if __name__ == "__main__":
    main(sys.argv[1:])
