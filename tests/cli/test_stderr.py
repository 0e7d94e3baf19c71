"""What reaches stderr, by how much is to be said."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from types import ModuleType

import pytest

from cacheblend_jax.cli import main as main_module
from cacheblend_jax.cli.main import COMMANDS, main
from cacheblend_jax.cli.options import add_output_options, print_status, print_warning
from cacheblend_jax.cli.progress import is_terminal, progress_bar, progress_of_parts


def talk(parsed: object) -> dict:
    """A command that says something in every way."""
    print("result")
    print_status("status")
    print_warning("take care")
    ours = logging.getLogger("cacheblend_jax.store.disk")
    ours.debug("ours in detail")
    ours.warning("ours")
    try:
        raise ValueError("broken")
    except ValueError:
        ours.exception("failed")
    for name in ("orbax.checkpoint", "jax._src.xla_bridge"):
        logging.getLogger(name).info("%s in detail", name)
        logging.getLogger(name).warning("%s warns", name)
    logging.getLogger("orbax.checkpoint").error("orbax fails")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("of Python", UserWarning, stacklevel=1)
    return {}


@pytest.fixture
def said(monkeypatch, capsys):
    """Runs the command, and returns the lines on stderr."""

    def add_parser(commands):
        parser = commands.add_parser("talk")
        add_output_options(parser)
        return parser

    module = ModuleType("talk")
    module.add_parser, module.run = add_parser, talk
    monkeypatch.setattr(main_module, "import_module", lambda name: module)
    monkeypatch.setitem(COMMANDS, "talk", "talks")

    def run(*options: str) -> list[str]:
        before = logging.getLogger().handlers[:]
        assert main(["talk", *options]) == 0
        assert logging.getLogger().handlers == before
        out, err = capsys.readouterr()
        assert out == "result\n"
        return err.splitlines()

    return run


ALWAYS = [
    "cacheblend-jax: warning: take care",
    "cacheblend-jax: warning: ours",
    "cacheblend-jax: error: failed: broken",
    "cacheblend-jax: warning: jax._src.xla_bridge: jax._src.xla_bridge warns",
    "cacheblend-jax: error: orbax.checkpoint: orbax fails",
]


def test_other_libraries_are_heard_where_they_fail(said):
    assert said() == ["status", *ALWAYS]


def test_quiet_leaves_warnings_and_errors(said):
    assert said("-q") == ALWAYS
    assert said() == ["status", *ALWAYS]  # the next command is not quiet


def test_verbose_has_details_tracebacks_and_all_warnings(said):
    lines = said("--verbose")
    assert "cacheblend-jax: debug: ours in detail" in lines
    assert "ValueError: broken" in lines
    assert "cacheblend-jax: warning: orbax.checkpoint: orbax.checkpoint warns" in lines
    assert any("UserWarning: of Python" in line for line in lines)
    assert not any("orbax.checkpoint in detail" in line for line in lines)
    assert logging.getLogger("cacheblend_jax").level == logging.NOTSET


def test_quiet_and_verbose_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "-q", "-v"])
    assert "not allowed with argument" in capsys.readouterr().err


class Terminal(io.StringIO):
    """A terminal's stderr."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("quiet", [False, True])
def test_quiet_shows_no_progress(monkeypatch, quiet):
    from cacheblend_jax.cli.progress import without_progress

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with without_progress(quiet):
        with progress_of_parts() as parts:
            parts.part("loading")
        with progress_bar("load") as advance:
            advance(1, 2)
    assert (terminal.getvalue() == "") == quiet
    assert "\x1b[3" not in terminal.getvalue()  # no colours, whatever NO_COLOR says


def test_a_terminal_that_knows_no_escapes_gets_none(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "dumb")
    assert not is_terminal()
    monkeypatch.setenv("TERM", "xterm")
    assert is_terminal()
