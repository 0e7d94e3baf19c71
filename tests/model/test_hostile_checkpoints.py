"""Checkpoints that are broken, hostile or of another kind: one line names file, key and value, before anything is made.

Nothing outside a checkpoint's directory is read, and nothing of a hub's repository is downloaded that loading doesn't
read.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from conftest import HF, edit_json, refusal
from safetensors.numpy import load_file, save_file

import cacheblend_jax as cb
from cacheblend_jax.model import tensor_reading
from cacheblend_jax.model.checkpoint import MAX_JSON_BYTES, checkpoint_directory
from cacheblend_jax.model.config_fields import INTEGERS, NUMBERS


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A copy of a checkpoint of several files; nothing may be allocated for its weights."""

    def allocate(*_):
        raise AssertionError("allocated")

    monkeypatch.setattr(tensor_reading, "aligned_empty", allocate)
    return shutil.copytree(HF / "llama3", tmp_path / "model")


ROPE_KEYS = {"low_freq_factor", "high_freq_factor", "factor", "attention_factor", "mscale", "mscale_all_dim"}
ROPE_KEYS |= {"beta_fast", "beta_slow"}
# Keys that one family's configurations alone have, with what makes a configuration one of that family.
GEMMA = {"architectures": ["Gemma3ForCausalLM"], "rope_parameters": None, "layer_types": None}
OWNERS = dict.fromkeys(("query_pre_attn_scalar", "sliding_window_pattern", "rope_local_base_freq"), GEMMA)
MIXTURE = {"architectures": ["Qwen3MoeForCausalLM"]}
OWNERS |= dict.fromkeys(("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"), MIXTURE)
OWNERS["num_local_experts"] = {"architectures": ["MixtralForCausalLM"]}
OWNERS["no_rope_layer_interval"] = {"architectures": ["SmolLM3ForCausalLM"]}
GRANITES = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")
OWNERS |= {key: {"architectures": ["GraniteForCausalLM"]} for key in GRANITES}
SOFT_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
OWNERS |= {key: {"architectures": ["Gemma2ForCausalLM"], "sliding_window": 8} for key in SOFT_CAPS}
OWNERS |= {key: {"architectures": ["GptOssForCausalLM"]} for key in ("swiglu_alpha", "swiglu_limit")}
NOT_NUMBERS = ["1", True, [2], {"a": 2}, -1, float("nan"), float("inf"), 10**400]


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 2.0, 10**12], ids=lambda value: repr(value)[:8])
@pytest.mark.parametrize("key", sorted(INTEGERS))
def test_every_integer_is_checked(checkpoint, key, value):
    qwen = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "layer_types": None}
    edit_json(checkpoint / "config.json", **OWNERS.get(key, qwen) | {key: value})
    message = refusal(checkpoint)
    assert f"config.json: {key} must be an integer in [" in message
    assert f"got {value!r}"[:30] in message


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 1e39], ids=lambda value: repr(value)[:8])
@pytest.mark.parametrize("key", sorted(NUMBERS))
def test_every_number_is_checked(checkpoint, key, value):
    rope = {"rope_type": "llama3", "factor": 2.0, "rope_theta": 1e4}
    given = {"rope_parameters": rope | {key: value}} if key in {*ROPE_KEYS, "rope_theta"} else {key: value}
    edit_json(checkpoint / "config.json", **OWNERS.get(key, {}) | given)
    message = refusal(checkpoint)
    prefix = "rope_parameters." if "rope_parameters" in given else ""
    assert f"config.json: {prefix}{key} must be a number in [" in message or "must be a JSON object" in message
    assert isinstance(value, dict) or f"got {value!r}"[:30] in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attention_bias": "false"}, "attention_bias must be true or false, got 'false'"),
        ({"mlp_bias": 0}, "mlp_bias must be true or false, got 0"),
        ({"tie_word_embeddings": [True]}, "tie_word_embeddings must be true or false, got [True]"),
        ({"hidden_act": 5}, "hidden_act must be text, got 5"),
        ({"dtype": {"a": 1}}, "dtype must be text, got {'a': 1}"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of texts, got 'LlamaForCausalLM'"),
        ({"architectures": [None]}, "architectures must be a list of texts, got [None]"),
        ({"architectures": None, "model_type": ["llama"]}, "model_type must be text, got ['llama']"),
        ({"rope_parameters": "yarn"}, "rope_parameters must be a JSON object, got 'yarn'"),
        ({"rope_parameters": {"rope_type": 3}}, "rope_parameters.rope_type must be text, got 3"),
        ({"rope_parameters": {"type": "yarn", "factor": 2.0, "truncate": 1}}, "rope_parameters.truncate must be true"),
        (
            {"rope_parameters": {"type": "llama3", "factor": 2.0, "low_freq_factor": 4, "high_freq_factor": 4}},
            "rope_parameters.high_freq_factor must be above low_freq_factor, got 4.0",
        ),
        (GEMMA | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not supported; Gemma3ForCausalLM"),
        (GEMMA | {"use_bidirectional_attention": True}, "use_bidirectional_attention True is not supported"),
        (GEMMA | {"hidden_activation": "mish"}, "hidden_activation 'mish' is not supported"),
        (GEMMA | {"sliding_window": None}, "sliding_window must be an integer in [1, 2147483647], got None"),
        (
            GEMMA | {"rope_parameters": {"rope_type": "default"}},
            "rope_parameters.rope_type must be absent: what is there is full_attention and sliding_attention",
        ),
        (
            GEMMA | {"rope_parameters": {"sliding_attention": {"rope_theta": 0}}},
            "rope_parameters.sliding_attention.rope_theta must be a number in [2, 1e+38], got 0",
        ),
        (
            {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": [1]},
            "text_config must be a JSON object, got [1]",
        ),
        ({"eos_token_id": "2"}, "eos_token_id must be a token id or a list of them, got '2'"),
        ({"eos_token_id": [2, -1]}, "eos_token_id must be a token id or a list of them, got [2, -1]"),
        ({"eos_token_id": [2, True]}, "eos_token_id must be a token id or a list of them, got [2, True]"),
    ],
    ids=str,
)
def test_other_fields_are_checked(checkpoint, changes, expected):
    edit_json(checkpoint / "config.json", **changes)
    assert f"config.json: {expected}" in refusal(checkpoint)


@pytest.mark.parametrize("value", ["2", [2, None], {"a": 2}, 2.0])
def test_stop_tokens_are_checked(checkpoint, value):
    edit_json(checkpoint / "generation_config.json", eos_token_id=value)
    assert "generation_config.json: eos_token_id must be a token id or a list of them, got" in refusal(checkpoint)


def test_layer_types_are_those_we_know(checkpoint):
    given = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 8}
    edit_json(checkpoint / "config.json", **given, layer_types=["linear_attention"] * 4)
    assert "layer type 'linear_attention' is not supported" in refusal(checkpoint)
    edit_json(checkpoint / "config.json", **given, layer_types=[["full_attention"]] * 4)
    assert "layer_types must be a list of texts" in refusal(checkpoint)
    edit_json(checkpoint / "config.json", **given, layer_types=["full_attention"] * 3)
    assert "3 layer types for 4 layers" in refusal(checkpoint)


def test_shapes_are_checked_before_anything_is_allocated(checkpoint):
    edit_json(checkpoint / "config.json", vocab_size=2**24, intermediate_size=2**20)
    assert "has shape [160, 32], the configuration asks for [16777216, 32]" in refusal(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[" * 100_000 + "]" * 100_000, "is not readable JSON"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "is not readable JSON"),
        ("[]", "must hold a JSON object, got list"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "is not readable JSON"),
        ("\x00", "is not readable JSON"),
    ],
    ids=["deep list", "deep object", "list", "long integer", "no JSON"],
)
def test_json_that_is_none_is_named(checkpoint, name, content, expected):
    (checkpoint / name).write_text(content)
    message = refusal(checkpoint)
    assert f"model/{name} " in message
    assert expected in message


def test_a_tokenizer_that_is_too_deep_is_named(checkpoint):
    (checkpoint / "tokenizer.json").write_text('{"added_tokens": ' + "[" * 100_000 + "]" * 100_000 + "}")
    assert "its tokenizer does not load" in refusal(checkpoint)


def test_a_huge_json_file_is_not_read(checkpoint):
    os.truncate(checkpoint / "config.json", MAX_JSON_BYTES + 1)  # sparse
    assert f"config.json must have at most {MAX_JSON_BYTES} bytes" in refusal(checkpoint)


TENSOR = "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "name",
    [
        *("../outside.safetensors", "/outside", "link/outside.safetensors", "a/../../outside.safetensors"),
        *(".", "..", "", "a\\b", "a\0", "\ud800", "n" * 10_000, 7, None, ["model"], {"a": 1}),
    ],
    ids=lambda name: repr(name)[:20],
)
def test_an_index_names_files_of_its_directory_only(checkpoint, tmp_path, name):
    outside = tmp_path / "outside.safetensors"
    shutil.copy(checkpoint / "model-00001-of-00004.safetensors", outside)
    (checkpoint / "link").symlink_to(tmp_path)
    index = checkpoint / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | {TENSOR: str(outside) if name == "/outside" else name})
    message = refusal(checkpoint)
    assert f"model.safetensors.index.json: weight_map['{TENSOR}'] must " in message
    assert "name" in message.split(" must ")[1]


def test_files_that_are_links_are_followed_and_folders_below_are_read(checkpoint, tmp_path, monkeypatch):
    """The hub's cache consists of links to files elsewhere."""
    monkeypatch.undo()
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(checkpoint.iterdir())):
        (checkpoint / file.name).rename(blobs / str(number))
        file.symlink_to(Path("..") / "blobs" / str(number))
    index = checkpoint / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    (checkpoint / "shards").mkdir()
    for name in set(weight_map.values()):
        (checkpoint / "shards" / name).symlink_to((checkpoint / name).resolve())
    fingerprint = cb.load_model(checkpoint).fingerprint
    edit_json(index, weight_map={tensor: f"shards/{name}" for tensor, name in weight_map.items()})
    assert len(cb.load_model(checkpoint).fingerprint) == len(fingerprint)


@pytest.mark.parametrize(
    "changes", [{"fast_tokenizer_files": ["tokenizer.1/../../../elsewhere.json"]}, {"gguf_file": "/elsewhere.gguf"}]
)
def test_a_tokenizer_is_read_from_its_directory_only(checkpoint, changes):
    edit_json(checkpoint / "tokenizer_config.json", **changes)
    (key,) = changes
    assert f"tokenizer_config.json: {key} must " in refusal(checkpoint)


@pytest.mark.parametrize(
    ("content", "package", "install"),
    [(b"\n\x0e\n\x05<unk>", "sentencepiece", "sentencepiece protobuf"), (b"IQ== 0\n", "tiktoken", "tiktoken")],
)
def test_the_package_that_a_tokenizer_needs_is_named(checkpoint, content, package, install, monkeypatch):
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tokenizer.model").write_bytes(content)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    assert f"tokenizer.model needs the package {package}: install it with pip install {install}," in refusal(checkpoint)


@pytest.mark.parametrize(
    ("stated", "named"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "4 bits"),
        ({"quantization_config": {"group_size": 64}}, "unknown method"),
    ],
    ids=str,
)
def test_a_quantisation_is_named(checkpoint, stated, named):
    edit_json(checkpoint / "config.json", **stated)
    (checkpoint / "model.safetensors.index.json").unlink()  # such weights have names of their own
    message = refusal(checkpoint)
    assert f"config.json: the weights are quantised ({named}), which is not supported; load " in message


@pytest.mark.parametrize(
    ("endings", "named"),
    [
        (["qweight", "qzeros", "scales"], "GPTQ or AWQ"),
        (["weight", "weight_scale_inv"], "FP8"),
        (["weight", "weight.absmax", "weight.quant_map"], "bitsandbytes"),
    ],
)
def test_a_quantisation_is_recognised_by_its_tensors(tmp_path, endings, named):
    directory = shutil.copytree(HF / "llama2", tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    tensor = tensors.pop(TENSOR)
    tensors |= {f"{TENSOR.removesuffix('.weight')}.{ending}": tensor for ending in endings}
    save_file(tensors, directory / "model.safetensors")
    assert f"model: the weights are quantised ({named}, by the tensor 'model.layers.2.mlp.up_proj" in refusal(directory)


def test_no_quantisation_is_none(checkpoint, monkeypatch):
    monkeypatch.undo()
    edit_json(checkpoint / "config.json", quantization_config=None)
    assert np.isfinite(np.asarray(cb.load_model(checkpoint).params.embedder["embedding"], np.float32)).all()


REPOSITORY = {
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("additional_chat_templates/rag.jinja", "README.md", "original/params.json", "pytorch_model.bin", "a.gguf"),
    *("model.fp16.safetensors", "consolidated.safetensors", "adapter/adapter_model.safetensors", "onnx/model.onnx"),
    *("checkpoint-500/model.safetensors", "checkpoint-500/config.json", "training_args.json", "vocab.json"),
}
READ = {
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("additional_chat_templates/rag.jinja", "vocab.json"),
}


@pytest.mark.parametrize(
    ("files", "weights"),
    [
        ({"model.safetensors"}, {"model.safetensors"}),
        (
            {"model.safetensors.index.json", "part-[1].safetensors", "part-2.safetensors", "part-1.safetensors"},
            {"model.safetensors.index.json", "part-[1].safetensors", "part-2.safetensors"},
        ),
    ],
    ids=["one file", "an index"],
)
def test_only_what_is_read_is_downloaded(tmp_path, monkeypatch, files, weights):
    """The same weights often lie there more than once, in other formats."""
    snapshot, revisions = tmp_path / "snapshots" / "0123abc", []
    weight_map = {"a": "part-[1].safetensors", "b": "part-2.safetensors", "c": "part-2.safetensors"}

    def snapshot_download(hub_id, *, allow_patterns, revision=None):
        assert hub_id == "owner/name"
        revisions.append(revision)
        for name in huggingface_hub.utils.filter_repo_objects(REPOSITORY | files, allow_patterns=allow_patterns):
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).write_text(json.dumps({"weight_map": weight_map}))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert checkpoint_directory("owner/name") == snapshot
    found = {str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()}
    assert found == READ | weights
    assert revisions == [None, "0123abc"]  # what changes meanwhile doesn't get in between
