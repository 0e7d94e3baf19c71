"""What every command does with its options: sizes, usage errors, standard streams, errors of a full disk."""

from __future__ import annotations

import errno
import io
import json
import os
from argparse import Namespace
from types import SimpleNamespace

import pytest
from store_cases import key_of, make_entry

import cacheblend_jax as cb
from cacheblend_jax.cli import answering
from cacheblend_jax.cli import ask as ask_module
from cacheblend_jax.cli.main import main
from cacheblend_jax.cli.options import open_store, size_of_at_least_one, write_json
from cacheblend_jax.errors import CacheBlendError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4096", 4096),
        ("4G", 4 * 2**30),
        ("4g", 4 * 2**30),
        ("512MiB", 2**29),
        ("512 MiB", 2**29),
        ("2Ki", 2048),
        ("500MB", 500 * 10**6),
        ("1.5T", 3 * 2**39),
        ("20B", 20),
    ],
)
def test_sizes_are_written_as_gnu_tools_write_them(text, size):
    assert size_of_at_least_one(text) == size


@pytest.mark.parametrize("option", ["--host-bytes", "--disk-bytes"])
@pytest.mark.parametrize("text", ["0", "0G", "-1", "4X", "G", "1e9", "4GG", "nan", "٤G", ""])
def test_sizes_that_make_no_sense_are_one_line(capsys, option, text):
    with pytest.raises(SystemExit, match="2"):
        main(["ask", "--docs", ".", option, text, "Why?"])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"argument {option}: must be " in line
    assert "; see cacheblend-jax ask --help" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND; see cacheblend-jax --help"),
        (["sing"], "invalid choice: 'sing'"),
        (["store", "ls"], "the following arguments are required: DIR; see cacheblend-jax store ls --help"),
        (["ask", "--docs", "a", "--n\new", "Why?"], "unrecognized arguments: --n ew; see"),
    ],
)
def test_usage_errors_are_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cacheblend-jax: error: ")
    assert message in line


def test_sizes_bound_memory_and_directory(tmp_path):
    with open_store(Namespace(store=str(tmp_path), host_bytes=2**20, disk_bytes=5, kv_dtype="int8")) as store:
        store.put(key_of(1), make_entry(1))
        store.flush()
        assert (store.host_bytes, store.kv_dtype) == (2**20, "int8")
        assert (store.stats.disk.rejected, store.stats.disk.entries) == (1, 0)
    with pytest.raises(CacheBlendError, match="add --store DIR"):
        open_store(Namespace(store=None, host_bytes=1, disk_bytes=1))


def test_json_on_stdout_is_alone_there(tmp_path, capsys):
    with cb.ChunkStore(tmp_path):
        pass
    assert main(["store", "ls", str(tmp_path), "--json", "-"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"entries": [], "bytes": 0}
    assert "0 entries" in printed.err
    assert main(["store", "ls", str(tmp_path / "none"), "--json", "-"]) == 2
    assert capsys.readouterr().out == ""


def stdin_of(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))


def test_a_question_may_come_from_stdin(tmp_path, monkeypatch, capsys):
    asked = []

    def stop(_named, _dtype, texts, _progress):
        asked.append(texts[0])
        raise CacheBlendError("far enough")

    monkeypatch.setattr(ask_module, "loading_reader", stop)
    (tmp_path / "records.md").write_text("Reyes took the nickname Cobalt.")
    for before in ([], ["--top-k", "1"]):
        stdin_of(monkeypatch, "Où est Reyes ?\n".encode())
        assert main(["ask", "--no-compile-cache", "--docs", str(tmp_path), *before, "-"]) == 2
    assert asked == ["Où est Reyes ?"] * 2
    capsys.readouterr()
    stdin_of(monkeypatch, b"O\xf9?")
    assert main(["ask", "--no-compile-cache", "--docs", str(tmp_path), "-"]) == 2
    assert "the question on stdin is not UTF-8: byte 0xf9 at byte offset 1" in capsys.readouterr().err
    stdin_of(monkeypatch, b" \n")
    assert main(["ask", "--no-compile-cache", "--docs", str(tmp_path), "-"]) == 2
    assert "the question is empty" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_not_a_matter_of_rights(tmp_path, monkeypatch, capsys, number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number), "file")

    with cb.ChunkStore(tmp_path / "kv"):
        pass
    trace = cb.Trace()
    monkeypatch.setattr("pathlib.Path.write_text", fail)
    with pytest.raises(CacheBlendError, match="free some space"):
        trace.save(str(tmp_path / "t.json"))
    assert main(["store", "ls", str(tmp_path / "kv"), "--json", str(tmp_path / "r.json")]) == 2
    monkeypatch.setattr(answering, "read_documents", fail)
    assert main(["ask", "--no-compile-cache", "--docs", str(tmp_path), "Why?"]) == 2
    for line in capsys.readouterr().err.strip().splitlines():
        assert line.endswith(("free some space", "free some space, or choose another file system"))
        assert "choose another path" not in line


def test_a_store_on_a_full_disk_says_so(tmp_path, monkeypatch):
    with cb.ChunkStore(tmp_path):
        pass
    monkeypatch.setattr("cacheblend_jax.store.disk.make_directories", lambda *_: False)
    monkeypatch.setattr("cacheblend_jax.store.space.shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with cb.ChunkStore(tmp_path) as store, pytest.raises(CacheBlendError, match="is full; free some space"):
        store.check_writable()


def test_results_are_json_whatever_they_hold(tmp_path):
    report = {"ttft_s": float("inf"), "modes": [{"kl": float("nan"), "ratio": 0.5}], "counts": (1, None)}
    write_json(tmp_path / "a.json", report)
    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert found == {"ttft_s": None, "modes": [{"kl": None, "ratio": 0.5}], "counts": [1, None]}
