"""How commands are put together: each has the same two functions, and nothing below them knows of the command line."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import pytest

import cacheblend_jax
import cacheblend_jax as cb
from cacheblend_jax import choices
from cacheblend_jax.cli import main as main_module
from cacheblend_jax.cli.main import COMMANDS, main, module_of, parser_of
from cacheblend_jax.evaluation.deployment import TIERS
from cacheblend_jax.evaluation.devices import DEVICES
from cacheblend_jax.runtime import user_cache
from cacheblend_jax.runtime.user_cache import PROGRAMS, WEIGHTS, is_kept
from pallas_kernels.dispatch import IMPLEMENTATIONS

PACKAGE = Path(cacheblend_jax.__file__).parent


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_declared_and_run_alike(command):
    module = module_of(command)
    assert list(inspect.signature(module.add_parser).parameters) == ["commands"]
    assert list(inspect.signature(module.run).parameters) == ["parsed"]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_list_of_commands_says_of_each_what_its_module_says(command):
    assert parser_of([]).format_help() == parser_of([command]).format_help()


NEEDLESS = ("jax", "flax", "orbax", "transformers", "scipy", "matplotlib", "bm25s")


WITHOUT_MODEL = (
    *("--help", "--version", "store ls DIRECTORY", "store ls nowhere", "nonsense", "completion bash"),
    *(f"{command} --help" for command in COMMANDS),
)


def test_what_needs_no_model_imports_no_jax(tmp_path):
    """Imports are what these commands would take their time for."""
    with cb.ChunkStore(tmp_path / "kv") as store:
        store.check_writable()
    code = f"""if True:
        import contextlib, sys
        from cacheblend_jax.cli.main import main
        for words in {WITHOUT_MODEL!r}:
            with contextlib.suppress(SystemExit):
                main(words.replace("DIRECTORY", {str(tmp_path / "kv")!r}).split())
            assert not (found := set({NEEDLESS!r}) & sys.modules.keys()), f"{{words}} imports {{found}}"
        print("none imports them")"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "none imports them", done.stdout + done.stderr


@pytest.fixture
def no_command(monkeypatch) -> None:
    """A command, `nothing`, that does nothing."""

    def add_parser(commands):
        parser = commands.add_parser("nothing")
        parser.add_argument("--no-weight-cache", action="store_true")
        parser.set_defaults(json=None, no_compile_cache=False)
        return parser

    module = ModuleType("nothing")
    module.add_parser, module.run = add_parser, lambda parsed: {}
    monkeypatch.setattr(main_module, "import_module", lambda name: module)
    monkeypatch.setitem(COMMANDS, "nothing", "does nothing")


@pytest.mark.usefixtures("no_command")
def test_weights_are_kept_on_disk_unless_the_user_objects(monkeypatch):
    monkeypatch.setattr(main_module, "_keep_compiled_programs", lambda: None)
    monkeypatch.setattr(user_cache, "_kept", set())
    for options, is_on in ((["--no-weight-cache"], False), ([], True)):
        assert main(["nothing", *options]) == 0
        assert is_kept(WEIGHTS) == is_on


@pytest.mark.usefixtures("no_command")
def test_compiled_programs_on_disk_have_a_bound(monkeypatch, own_user_cache):
    changed = {}
    monkeypatch.setattr(jax.config, "update", changed.__setitem__)
    monkeypatch.setattr(user_cache, "_kept", set())
    for directory, size in ((None, -1), (None, 1000), ("/their/own", -1)):
        changed.clear()
        monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", directory, raising=False)
        monkeypatch.setattr(type(jax.config), "jax_compilation_cache_max_size", size, raising=False)
        assert main(["nothing"]) == 0
        assert changed.get("jax_compilation_cache_dir") == (None if directory else str(own_user_cache / "compiled"))
        assert changed.get("jax_compilation_cache_max_size") == (4 * 2**30 if not directory and size == -1 else None)
    assert is_kept(PROGRAMS)


def test_names_that_stand_apart_are_those_of_what_they_name():
    assert set(choices.KERNELS) == {"auto", *IMPLEMENTATIONS}
    assert tuple(DEVICES) == choices.DEVICES
    assert tuple(TIERS) == choices.TIERS
    built_in = {
        name for name, each in cb.SELECTORS.items() if each.score.__module__ == "cacheblend_jax.blend.selectors"
    }
    assert set(choices.BUILT_IN_SELECTORS) == built_in
    assert set(choices.SELECTORS_COMPARED) < set(choices.BUILT_IN_SELECTORS)


def test_nothing_below_the_command_line_knows_of_it():
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name == "cli" or path.name == "__main__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            known = [name for name in names if name == "argparse" or name.startswith("cacheblend_jax.cli")]
            assert not known, f"{path.relative_to(PACKAGE)} imports {known[0]}"
