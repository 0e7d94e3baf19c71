"""Defaults of options from the user's configuration file."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from cacheblend_jax.cli.defaults import SHARED, configuration_path
from cacheblend_jax.cli.main import COMMANDS, declared, main, parser_of
from cacheblend_jax.errors import CacheBlendError


@pytest.fixture
def configured():
    """Writes the configuration file."""
    path = configuration_path()
    path.parent.mkdir(exist_ok=True)
    return path.write_text


def parsed(words: str) -> argparse.Namespace:
    return parser_of(words.split()).parse_args(words.split())


def test_what_the_file_says_is_the_default(configured):
    configured(
        'model = "smollm2"\ndocs = ["notes"]\nchunk-tokens = 100\nhost-bytes = "2G"\nno-compile-cache = true\n'
        '[ask]\ntop-k = 8\nratio = 0.3\nmode = "full"\n[precompute]\nstore = "kv"\n'
    )
    asked = parsed("ask question")
    assert (asked.model, asked.docs, asked.chunk_tokens, asked.host_bytes) == ("smollm2", ["notes"], 100, 2**31)
    assert (asked.no_compile_cache, asked.top_k, asked.ratio, asked.mode) == (True, 8, 0.3, "full")
    assert (asked.question, asked.store) == ("question", None)
    assert (parsed("precompute").store, parsed("precompute").docs) == ("kv", ["notes"])


def test_the_command_line_counts_more(configured):
    configured('docs = ["notes", "more"]\n[ask]\ntop-k = 8\nmodel = "own"\n[bench]\nratios = [0.1, 0.2]\n')
    asked = parsed("ask --top-k 3 --docs a b --docs c")
    assert (asked.top_k, asked.model, asked.docs) == (3, "own", ["a", "b", "c"])
    assert parsed("bench").ratios == [0.1, 0.2]
    assert parsed("bench --ratios 0.5").ratios == [0.5]


def test_a_shared_default_takes_no_side_where_options_exclude_each_other(configured):
    configured('model = "smollm2"\n')
    assert parsed("bench --shape bench-16l").model is None
    configured('[bench]\nmodel = "smollm2"\n')
    assert parsed("bench").model == "smollm2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = ", "is not TOML: Invalid value"),
        ("modle = 'x'", "unknown option 'modle'; expected one of chunk-tokens, context, .*; others stand in the table"),
        ("[aks]\nmodel = 'x'", "unknown table 'aks'; expected one of ask, bench, "),
        ("[ask]\ntopk = 3", "unknown option of [ask] 'topk'; expected one of all, chunk-tokens, "),
        ("[ask]\nhelp = true", "unknown option of [ask] 'help'"),
        ("[ask]\ntop-k = 0", "ask.top-k: must be a whole number of at least 1, got '0'"),
        ("chunk-tokens = true", "chunk-tokens: must be text or a number, got True"),
        ("[ask]\nmode = 'fast'", "ask.mode: must be one of full, prefix, reuse, blend, got 'fast'"),
        ("[ask]\nall = 1", "ask.all: must be true or false, got 1"),
        ("docs = 'notes'", "docs: must be a list of at least one value, got 'notes'"),
        ("[ask]\ntemperature = 'warm'", "ask.temperature: could not convert"),
    ],
)
def test_what_cannot_be_used_is_one_line_that_names_it(configured, capsys, text, message):
    configured(text)
    assert main(["ask", "--docs", "x", "question"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cacheblend-jax: error: {configuration_path()}")
    found, _, end = message.partition(".*")
    assert found in line
    assert end in line


def test_a_file_that_cannot_be_read_is_an_error(capsys):
    configuration_path().mkdir(parents=True)
    assert main(["ask", "--docs", "x", "question"]) == 2
    assert "Is a directory" in capsys.readouterr().err
    with pytest.raises(CacheBlendError):
        parser_of(["ask"])
    assert parser_of([]) is not None


def test_every_shared_name_is_an_option_of_several_commands():
    _, parsers = declared(COMMANDS)
    for name in SHARED:
        assert sum(f"--{name}" in parser._option_string_actions for parser in parsers.values()) >= 2, name


def test_the_guide_names_the_shared_options():
    guide = (Path(__file__).parents[2] / "docs" / "guide" / "commands.md").read_text()
    assert all(f"`{name}`" in guide for name in SHARED)


def test_help_names_the_file(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert str(configuration_path()) in "".join(capsys.readouterr().out.split())


def test_completion_knows_commands_and_options(capsys):
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in (*COMMANDS, "--top-k", "verify"))


def test_completion_without_its_package_names_it(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "shtab", None)
    assert main(["completion", "zsh"]) == 2
    assert capsys.readouterr().err.endswith("pip install 'cacheblend-jax[completion]'\n")
