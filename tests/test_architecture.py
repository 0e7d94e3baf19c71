"""The house stands as docs/architecture.md says: packages use only what is below them, and no files need each other."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ON_EVERY_VERSION

ROOT = Path(__file__).parents[1]
BESIDE = ("errors", "choices")  # modules that every package may use
# What else each package, or what stands beside them, may use.
ROOMS = {
    "pallas_kernels": (),
    "runtime": ("pallas_kernels",),
    "model": ("runtime", "pallas_kernels"),
    "store": ("runtime",),
    "blend": ("model", "runtime", "pallas_kernels"),
    "engine": ("blend", "store", "model", "runtime", "pallas_kernels"),
    "evaluation": ("engine", "blend", "store", "model", "runtime", "pallas_kernels", "documents"),
    "serving": ("engine", "blend", "store", "model", "runtime"),
    "cli": ("evaluation", "serving", "engine", "blend", "store", "model", "runtime", "documents"),
    "documents": ("model", "runtime"),
    "errors": (),
    "choices": (),
}


def modules() -> dict[str, Path]:
    paths = [path for package in ("cacheblend_jax", "pallas_kernels") for path in (ROOT / package).rglob("*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules that a file takes something from: of a package, the module that it has it from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in found if name in known}


def room_of(name: str) -> str:
    first, *rest = name.split(".")
    return first if first == "pallas_kernels" or not rest else rest[0]


def test_rooms_use_only_what_is_below_them():
    known = modules()
    for name, path in known.items():
        room = room_of(name)
        for used in imports(path, known):
            if room in ROOMS and room_of(used) not in (room, *BESIDE):
                assert room_of(used) in ROOMS[room], f"{name} imports {used}"


def test_no_files_need_each_other():
    known = modules()
    # Packages only pass on what their modules hold.
    graph = {
        name: {used for used in imports(path, known) if known[used].name != "__init__.py"}
        for name, path in known.items()
        if path.name != "__init__.py"
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_few_modules_stand_beside_the_rooms():
    loose = [path.name for path in (ROOT / "cacheblend_jax").glob("*.py")]
    assert len(loose) <= 6, loose


PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_pages_point_to_is_there(page):
    """Source files by their paths from the root or from the package; links from the page."""
    text = page.read_text()
    for path in re.findall(r"`(\w+/[\w./]+\.py)`", text):
        assert any((place / path).exists() for place in (ROOT, ROOT / "cacheblend_jax", ROOT / "pallas_kernels")), path
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (page.parent / path).exists(), path


@pytest.mark.parametrize("begin", ON_EVERY_VERSION)
def test_what_runs_on_every_version_is_there(begin):
    path, _, name = begin.partition("::")
    files = list((ROOT / "tests").glob(f"{path}*"))
    assert files
    assert not name or f"def {name.partition('[')[0]}" in files[0].read_text()
