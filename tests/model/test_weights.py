"""Loading checkpoints: what is missing, extra, misshapen or not supported is named; memory stays bounded."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import HF
from safetensors.numpy import load_file, save_file

import cacheblend_jax as cb
from cacheblend_jax.model import save_check_layer
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.rope import inverse_frequencies, rope_tables
from cacheblend_jax.model.rope_config import NO_ROPE
from cacheblend_jax.model.sharding import partition_of
from cacheblend_jax.model.tensor_names import hugging_face_tensors
from cacheblend_jax.model.tensor_reading import all_finite
from cacheblend_jax.model.weights import load_params, open_model


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of a single-file checkpoint, to be damaged."""
    return shutil.copytree(HF / "llama2", tmp_path / "model")


def edit_config(directory, **changes):
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def edit_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_weights_keep_their_dtype_unless_cast():
    assert cb.load_model(HF / "llama2").params.embedder["embedding"].dtype == ml_dtypes.bfloat16
    for dtype in ("float32", "float16"):
        model = cb.load_model(HF / "llama2", dtype=dtype)
        assert model.config.dtype == dtype
        assert model.params.layers["q_proj"]["kernel"].dtype == dtype


def test_weights_without_a_stated_dtype_keep_that_of_their_file(checkpoint):
    edit_config(checkpoint, dtype=None, torch_dtype=None)
    model = cb.load_model(checkpoint)
    assert model.config.dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
    # Where tensors differ, the largest decides: small norms are often kept in float32.
    edit_tensors(checkpoint, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype(np.float32)}))
    assert cb.load_model(checkpoint).config.dtype == "bfloat16"
    edit_tensors(checkpoint, lambda t: t.update({name: x.astype(np.float16) for name, x in t.items()}))
    assert cb.load_model(checkpoint).config.dtype == "float16"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_what_is_finite_is_seen_in_every_dtype(dtype):
    largest = float(ml_dtypes.finfo("float16").max)
    for shape in ((), (0,), (3, 5), (2**16 + 3,)):
        assert all_finite(np.full(shape, -largest, dtype))
        for value in (np.nan, np.inf, -np.inf):
            tensor = np.ones(shape, dtype)
            tensor[(-1,) * tensor.ndim if tensor.size else ...] = value
            assert all_finite(tensor) == (tensor.size == 0)


def test_a_stored_head_that_is_not_the_embedding_is_kept(checkpoint, caplog):
    """As by transformers 5, whatever tie_word_embeddings says."""
    edit_config(checkpoint, tie_word_embeddings=False)
    untied = cb.load_model(checkpoint)
    edit_config(checkpoint, tie_word_embeddings=True)
    model = cb.load_model(checkpoint)
    assert not model.config.tied_embeddings
    assert len([line for line in caplog.messages if "a different lm_head.weight is stored" in line]) == 1
    np.testing.assert_array_equal(
        model.params.embedder["lm_head"]["kernel"], untied.params.embedder["lm_head"]["kernel"]
    )
    assert model.fingerprint == untied.fingerprint

    edit_tensors(checkpoint, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    caplog.clear()
    model = cb.load_model(checkpoint)
    assert model.config.tied_embeddings
    assert "lm_head" not in model.params.embedder
    assert not caplog.messages


def test_weights_are_stacked_and_transposed():
    tensors = load_file(HF / "llama2" / "model.safetensors")
    kernel = np.asarray(cb.load_model(HF / "llama2").params.layers["down_proj"]["kernel"])
    for layer in range(4):
        np.testing.assert_array_equal(kernel[layer], tensors[f"model.layers.{layer}.mlp.down_proj.weight"].T)


def test_progress_ends_at_the_total():
    seen = []
    cb.load_model(HF / "llama3", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == max(seen)[0]
    assert len(seen) > 5


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("own", [range(8), range(2, 6)])  # devices: all, and those of one of two hosts
def test_progress_ends_at_the_total_of_a_hosts_own_shares(monkeypatch, own, by_layer):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    held, made = jax.sharding.NamedSharding.addressable_devices_indices_map, []

    def own_indices(sharding, shape):
        return {device: index for device, index in held(sharding, shape).items() if device.id in own}

    def of_some(shape, sharding, arrays):
        made.extend(arrays)
        return arrays[0]

    monkeypatch.setattr(jax.sharding.NamedSharding, "addressable_devices_indices_map", own_indices)
    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", of_some)
    opened, seen = open_model(HF / "llama3"), []
    split = {"partition": partition_of(mesh, opened.config), "by_layer": by_layer}
    load_params(opened.checkpoint, opened.config, progress=lambda *counts: seen.append(counts), **split)
    assert seen[-1][0] == seen[-1][1]
    assert {array.device.id for array in made} == set(own)


TENSOR = "model.layers.2.mlp.up_proj.weight"
DAMAGES = {
    "missing tensor": (lambda d: edit_tensors(d, lambda t: t.pop(TENSOR)), rf"missing, among them {TENSOR}"),
    "extra tensor": (lambda d: edit_tensors(d, lambda t: t.update(extra=t[TENSOR])), "among them 'extra'"),
    "misshapen tensor": (
        lambda d: edit_tensors(d, lambda t: t.update({TENSOR: t[TENSOR][:, 1:].copy()})),
        rf"{TENSOR} has shape \[48, 31\], the configuration asks for \[48, 32\]",
    ),
    "integer tensor": (
        lambda d: edit_tensors(d, lambda t: t.update({TENSOR: np.zeros((48, 32), np.int8)})),
        rf"{TENSOR} has dtype I8",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no model.safetensors"),
    "pickled weights": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        "pytorch_model.bin is pickle, which is not loaded",
    ),
    "truncated weights": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:1000]),
        "not a readable safetensors file",
    ),
    "no configuration": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "broken configuration": (lambda d: (d / "config.json").write_text("{"), "not readable JSON"),
    "list configuration": (lambda d: (d / "config.json").write_text("[]"), "must hold a JSON object, got list"),
    "architecture": (
        lambda d: edit_config(d, architectures=["GemmaForCausalLM"]),
        "architecture 'GemmaForCausalLM' is not supported; supported: LlamaForCausalLM, Mistral",
    ),
    "RoPE type": (
        lambda d: edit_config(d, rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
        "RoPE type 'dynamic' is not supported; supported: default, linear, llama3, yarn, longrope",
    ),
    "old RoPE type": (
        lambda d: edit_config(d, rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2.0}),
        "RoPE type 'dynamic' is not supported",
    ),
    "RoPE factor": (lambda d: edit_config(d, rope_parameters={"rope_type": "linear"}), "needs a factor"),
    "activation": (lambda d: edit_config(d, hidden_act="mish"), "hidden_act 'mish' is not supported"),
    "no size": (lambda d: edit_config(d, hidden_size=None), "hidden_size must be an integer in .*, got None"),
    "negative epsilon": (
        lambda d: edit_config(d, rms_norm_eps=-1),
        r"model/config\.json: rms_norm_eps must be a number in \[1e-30, 1\], got -1$",
    ),
    "negative theta": (
        lambda d: edit_config(d, rope_parameters={"rope_type": "default", "rope_theta": -1}),
        r"model/config\.json: rope_parameters\.rope_theta must be a number in \[2, 1e\+38\], got -1$",
    ),
    "old negative theta": (
        lambda d: edit_config(d, rope_parameters=None, rope_theta=-1.0),
        r"model/config\.json: rope_theta must be a number in \[2, 1e\+38\], got -1\.0$",
    ),
    "NaN epsilon": (
        lambda d: edit_config(d, rms_norm_eps=float("nan")),
        "rms_norm_eps must be a number in .*, got nan",
    ),
    "text for a number": (
        lambda d: edit_config(d, num_key_value_heads="1"),
        r"model/config\.json: num_key_value_heads must be an integer in \[1, 4096\], got '1'$",
    ),
    "text for a flag": (
        lambda d: edit_config(d, tie_word_embeddings="false"),
        "tie_word_embeddings must be true or false, got 'false'",
    ),
    "NaN weights": (
        lambda d: edit_tensors(d, lambda t: t[TENSOR].__setitem__((3, 4), np.nan)),
        rf"model\.safetensors: {TENSOR} holds NaN or infinity",
    ),
    "infinite weights": (
        lambda d: edit_tensors(d, lambda t: t[TENSOR].__setitem__((3, 4), -np.inf)),
        rf"model\.safetensors: {TENSOR} holds NaN or infinity",
    ),
    "heads": (lambda d: edit_config(d, num_key_value_heads=3), "multiple of num_key_value_heads, got 4 and 3"),
    "layers": (lambda d: edit_config(d, num_hidden_layers=5), "missing, among them model.layers.4."),
    "fewer layers": (lambda d: edit_config(d, num_hidden_layers=3), "among them 'model.layers.3."),
    "tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), "its tokenizer does not load"),
    "check layer": (
        lambda d: (d / "cacheblend.json").write_text('{"check_layer": 9}'),
        r"check_layer must be in \[1, 3\], got 9",
    ),
    "missing shard": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "shard-1.safetensors"}}'),
        "shard-1.safetensors is missing",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(checkpoint, damage):
    make, message = DAMAGES[damage]
    make(checkpoint)
    with pytest.raises(cb.CheckpointError, match=message) as error:
        cb.load_model(checkpoint)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "nowhere"])
def test_a_missing_directory_is_named(name):
    with pytest.raises(cb.CheckpointError, match=f"'{name}' is not a directory; pass"):
        cb.load_model(name)


def test_an_unknown_dtype_is_named():
    with pytest.raises(cb.CheckpointError, match="dtype must be one of float32, bfloat16, float16, got 'int8'"):
        cb.load_model(HF / "llama2", dtype="int8")


def test_a_directory_without_a_tokenizer_serves_token_ids():
    model = cb.load_model(HF / "llama2")
    assert model.tokenizer is None
    assert cb.Engine(model).prefill(cb.Prompt([1], [[2, 3]], [4])).logits.shape == (160,)


def test_a_shipped_check_layer_is_the_default_and_the_users_own_wins(checkpoint, tmp_path):
    (checkpoint / "cacheblend.json").write_text('{"check_layer": 2}')
    assert cb.load_model(checkpoint).config.check_layer == 2
    saved = save_check_layer(cb.load_model(checkpoint), 3)
    assert cb.load_model(checkpoint).config.check_layer == 3
    assert checkpoint not in saved.parents
    assert (checkpoint / "cacheblend.json").read_text() == '{"check_layer": 2}'
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    assert cb.load_model(copy).config.check_layer == 3
    edit_tensors(copy, lambda tensors: tensors.update({TENSOR: tensors[TENSOR] * 2}))
    assert cb.load_model(copy).config.check_layer == 2
    (copy / "cacheblend.json").unlink()
    assert cb.load_model(copy).config.check_layer == 1


@pytest.mark.parametrize("record", ["{}", "{", '{"check_layer": 9}', '{"check_layer": true}', '{"check_layer": "2"}'])
def test_a_saved_check_layer_that_is_none_is_passed_over(checkpoint, record):
    saved = save_check_layer(cb.load_model(checkpoint), 3)
    saved.write_text(record)
    assert cb.load_model(checkpoint).config.check_layer == 1


def test_a_check_layer_that_cannot_be_saved_is_an_error(checkpoint, own_user_cache):
    own_user_cache.mkdir()
    (own_user_cache / "check-layers").write_text("a file")
    with pytest.raises(cb.CheckpointError, match=r"cannot save the check layer in .*check-layers"):
        save_check_layer(cb.load_model(checkpoint), 2)


def test_a_model_of_no_files_saves_no_check_layer():
    model = cb.load_model(HF / "llama2")
    assert save_check_layer(cb.Model(model.config, model.params), 2) is None


def test_nothing_is_written_in_the_checkpoints_directory(checkpoint):
    def listing():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in (checkpoint, *checkpoint.rglob("*"))}

    before = listing()
    model = cb.load_model(checkpoint, verify=True)
    assert model.fingerprint
    save_check_layer(model, 2)
    assert listing() == before


def test_the_stop_tokens_are_the_checkpoints(checkpoint):
    assert cb.load_model(checkpoint).stop_token_ids == (2,)
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert cb.load_model(checkpoint).stop_token_ids == (2, 7, 9)


@pytest.mark.parametrize("case", sorted(path.name for path in HF.iterdir()))
def test_configuration_and_weights_go_back_to_hugging_face(case):
    model = cb.load_model(HF / case)
    assert ModelConfig.from_hugging_face(model.config.to_hugging_face()) == model.config
    written = hugging_face_tensors(model.params, model.config)
    stored = {name: array for file in (HF / case).glob("*.safetensors") for name, array in load_file(file).items()}
    assert written.keys() == stored.keys()
    for name, array in stored.items():
        np.testing.assert_array_equal(written[name], array)


OLD = {"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
OLD |= {"num_attention_heads": 2}


def test_configurations_of_transformers_4_and_5_read_alike():
    old = OLD | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "bfloat16"}
    new = OLD | {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}, "dtype": "bfloat16"}
    read = ModelConfig.from_hugging_face(old)
    assert read == ModelConfig.from_hugging_face(new)
    assert (read.rope.type, read.rope.theta, read.rope.factor, read.dtype) == ("linear", 5e5, 2.0, "bfloat16")


@pytest.mark.parametrize("tower", ["language_model.model.", "model.language_model."])
def test_the_text_tower_of_a_multimodal_checkpoint_is_the_text_model(tmp_path, tower):
    """As Gemma 3 from 4B on is published: the keys nested, in the form of transformers 4, and the names longer."""
    text = json.loads((HF / "gemma3" / "config.json").read_text())
    text |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_parameters": None, "layer_types": None}
    shared = {"torch_dtype": text.pop("dtype"), "eos_token_id": [2, 106]}
    kinds = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(kinds | shared | {"text_config": text}))
    stored = load_file(HF / "gemma3" / "model.safetensors")
    tensors = {name.replace("model.", tower, 1): array for name, array in stored.items()}
    head = "language_model.lm_head.weight" if tower == "language_model.model." else "lm_head.weight"
    tensors[head] = tensors[f"{tower}embed_tokens.weight"].copy()
    outer = tower.removesuffix("language_model.").removesuffix("language_model.model.")
    for other in ("vision_tower.a.weight", "multi_modal_projector.b"):
        tensors[outer + other] = np.zeros((2, 3), np.float32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, alone = cb.load_model(tmp_path), cb.load_model(HF / "gemma3")
    assert model.config == alone.config
    assert model.stop_token_ids == (2, 106)
    jax.tree.map(np.testing.assert_array_equal, model.params, alone.params)


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_windows_as_transformers_reads_them(architecture):
    from transformers import AutoConfig

    raw = OLD | {"model_type": architecture.lower(), "sliding_window": 5, "use_sliding_window": True}
    raw |= {"max_window_layers": 1, "num_key_value_heads": 2}
    theirs = AutoConfig.for_model(**raw)
    layer_types = getattr(theirs, "layer_types", None)
    if architecture == "Mistral":
        wanted = (5, 5)
    elif layer_types is None:
        wanted = (None, None)
    else:
        wanted = tuple(5 if kind == "sliding_attention" else None for kind in layer_types)
    assert ModelConfig.from_hugging_face(raw).windows == wanted


FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "granite", "smollm3", "phi3"]
FAMILIES += ["qwen3_moe", "mixtral", "gpt_oss"]
REFUSED_WITHOUT_KV_HEADS = ("mistral", "gemma2", "gemma3_text", "qwen3_moe", "mixtral", "gpt_oss")
SIZES = {"vocab_size": 9, "hidden_size": 512, "intermediate_size": 8, "num_hidden_layers": 40}
SIZES |= {"num_attention_heads": 64}  # a multiple of every family's default of num_key_value_heads


def read_by_transformers(raw: dict) -> dict:
    from transformers import AutoConfig

    return AutoConfig.for_model(**raw).to_dict()


def longest_sequence(full: dict) -> int:
    """What vLLM makes of a configuration of transformers; never less than it states."""
    rope, stated = full["rope_parameters"], full["max_position_embeddings"]
    if rope.get("rope_type") not in ("linear", "yarn"):  # Gemma's, by layer type, are counted in what it states
        return stated
    original = full.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    return max(stated, int(rope["factor"] * (original if rope["rope_type"] == "yarn" else stated)))


def assert_read_alike(raw: dict) -> None:
    """What `raw` alone says, we read as from the configuration that transformers makes of it, all keys given."""
    full = read_by_transformers(raw)
    ours, theirs = ModelConfig.from_hugging_face(raw), ModelConfig.from_hugging_face(full)
    assert ours == theirs
    head_dim = full.get("head_dim") or full["hidden_size"] // full["num_attention_heads"]
    gemma = raw["model_type"] in ("gemma2", "gemma3_text")
    window = None if raw["model_type"] in ("llama", "olmo2", "granite") else full["sliding_window"]
    kinds = full.get("layer_types") or ["sliding_attention"] * len(ours.windows)
    assert ours.windows == tuple(window if kind == "sliding_attention" else None for kind in kinds)
    assert (ours.num_kv_heads, ours.head_dim) == (full["num_key_value_heads"], head_dim)
    assert (ours.max_positions, ours.rms_norm_eps) == (longest_sequence(full), full["rms_norm_eps"])
    activation = full["hidden_activation" if gemma else "hidden_act"]
    assert (ours.activation, ours.tied_embeddings) == (activation, full["tie_word_embeddings"])
    ropes = full["rope_parameters"]
    implied = 2.0 if ours.rope_divisors else 1.0  # of `SCALED`
    ropes = [ropes["full_attention"], ropes["sliding_attention"]] if raw["model_type"] == "gemma3_text" else [ropes]
    assert [(x.type, x.theta, x.factor) for x in ours.ropes if x.type != NO_ROPE] == [
        (x["rope_type"], x["rope_theta"], x.get("factor") or implied) for x in ropes
    ]
    scale = full["query_pre_attn_scalar"] ** -0.5 if gemma else full.get("attention_multiplier")
    assert ours.attention_scale == scale
    caps = {key: full.get(f"{key}_logit_softcapping") for key in ("attn", "final")}
    assert (ours.attention_soft_cap, ours.logits_soft_cap) == (caps["attn"], caps["final"])
    assert ours.residual_scale == full.get("residual_multiplier", 1.0)
    assert ours.logits_scale == 1 / full.get("logits_scaling", 1.0)
    assert gemma or ours.embedding_scale == full.get("embedding_multiplier", 1.0)
    assert ours.num_experts == full.get("num_local_experts", 0)
    assert ours.experts_per_token == full.get("num_experts_per_tok", 0)
    if ours.num_experts:
        assert ours.expert_size == full.get("moe_intermediate_size", full["intermediate_size"])
        assert ours.experts_sum_to_one == full.get("norm_topk_prob", True)
    turned = [bool(switch) for switch in full.get("no_rope_layers", [1])]
    assert ours.rotated == (() if all(turned) else tuple(turned))
    without = ("mistral", "qwen2", "phi3", "mixtral")  # their layers read no such key
    bias = raw["model_type"] not in without and full["attention_bias"]
    assert (ours.output_bias, ours.qkv_bias) == (bias, bias or raw["model_type"] == "qwen2")
    assert ours.mlp_bias == (raw["model_type"] in ("llama", "granite", "smollm3") and full["mlp_bias"])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_absent_key_has_the_default_of_transformers(family):
    assert_read_alike({"model_type": family} | SIZES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "given",
    [
        {"num_key_value_heads": None},
        {"sliding_window": None},
        {"sliding_window": 7},
        {"use_sliding_window": True},
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
        {"sliding_window_pattern": 4},
        {"rope_parameters": None},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 64},
        {"attention_bias": True, "mlp_bias": True},
    ],
    ids=lambda given: ",".join(given),
)
def test_given_keys_are_read_as_by_transformers(family, given):
    if family in REFUSED_WITHOUT_KV_HEADS and "num_key_value_heads" in given:
        pytest.skip("transformers 5 refuses it")
    if family == "phi3" and any(key.startswith("rope_") for key in given):
        pytest.skip("of a type that Phi's configurations do not have")
    if family in ("gemma2", "gemma3_text", "gpt_oss") and given.get("sliding_window", 1) is None:
        pytest.skip("of no form that its layers can be made of")
    if family == "gemma3_text" and "rope_parameters" in given:
        pytest.skip("of no form that Gemma's layers can be made of")
    assert_read_alike({"model_type": family} | SIZES | given)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("rope", "stated", "wanted"),
    [
        ({"rope_type": "default"}, 512, 512),
        ({"type": "linear", "factor": 4.0}, 512, 2048),
        ({"rope_type": "linear", "factor": 2.5}, 513, 1282),
        (YARN, 512, 2048),  # Qwen: the length before scaling
        (YARN, 2048, 2048),  # others: the length after scaling
        (YARN, 640, 2048),
        (YARN, 4096, 4096),
        ({"rope_type": "yarn", "factor": 4.0}, 512, 2048),
        (LLAMA3 | {"original_max_position_embeddings": 512}, 4096, 4096),
        ({"rope_type": "linear", "factor": 1000.0}, 2**30, 2**31 - 1),
    ],
)
def test_rope_scaling_makes_sequences_longer(rope, stated, wanted):
    config = ModelConfig.from_hugging_face(OLD | {"max_position_embeddings": stated, "rope_scaling": rope})
    assert config.max_positions == wanted
    if wanted < 2**31 - 1:
        assert ModelConfig.from_hugging_face(config.to_hugging_face()).max_positions == wanted


def test_users_may_choose_how_long_sequences_are():
    model = cb.load_model(HF / "llama_yarn")
    longer = cb.load_model(HF / "llama_yarn", max_positions=model.config.max_positions + 8)
    assert longer.config.max_positions == model.config.max_positions + 8
    assert longer.config.rope == model.config.rope
    assert longer.fingerprint == model.fingerprint  # stored KV is the same
    assert cb.load_model(HF / "llama2", max_positions=1).config.max_positions == 1


@pytest.mark.parametrize("value", [0, -1, 2**31, 8.0, True, "8"])
def test_a_length_that_is_none_is_named(value):
    with pytest.raises(cb.CheckpointError, match=r"max_positions must be None or a whole number in \[1, .*, got"):
        cb.load_model(HF / "llama2", max_positions=value)


@pytest.mark.parametrize(
    "given",
    [
        {"sliding_window_pattern": 1},
        {"sliding_window_pattern": 4, "sliding_window": 512},
        {"layer_types": ["full_attention", "sliding_attention"] * 20},
        {"query_pre_attn_scalar": 168, "head_dim": 128},
        {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 3e5}}},
        {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 3e4}}},
        {
            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 3e5}},
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
        {"tie_word_embeddings": False, "hidden_activation": "gelu"},
    ],
    ids=lambda given: ",".join(given),
)
def test_gemmas_own_keys_are_read_as_by_transformers(given):
    assert_read_alike({"model_type": "gemma3_text"} | SIZES | given)


LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 8.0]}
LONGROPE |= {"original_max_position_embeddings": 4096}
SCALED = {"max_position_embeddings": 8192, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("granite", {"attention_multiplier": 0.0078125, "embedding_multiplier": 12, "residual_multiplier": 0.22}),
        ("granite", {"logits_scaling": 16, "mlp_bias": True}),
        ("phi3", {"head_dim": 96, "partial_rotary_factor": 0.75, "sliding_window": 9}),
        ("phi3", SCALED | {"rope_scaling": LONGROPE}),
        ("phi3", SCALED | {"rope_scaling": LONGROPE | {"type": "su"}}),
        ("phi3", {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5, "rope_type": "default"}}),
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": 12.5, "query_pre_attn_scalar": 144}),
        ("gemma2", {"layer_types": ["full_attention"] * 40, "hidden_activation": "gelu"}),
        ("gemma3_text", {"final_logit_softcapping": 30.0}),
        ("smollm3", {"no_rope_layers": [1] * 40}),
        ("smollm3", {"no_rope_layers": [0, 1] * 20, "use_sliding_window": True, "sliding_window": 7}),
        ("smollm3", {"no_rope_layer_interval": 3, "use_sliding_window": True, "sliding_window": 7}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_keys_of_one_family_are_read_as_by_transformers(family, given):
    assert_read_alike({"model_type": family} | SIZES | given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"no_rope_layers": [1, 2]}, r"no_rope_layers must be a list of 0 and 1, got \[1, 2\]"),
        ({"no_rope_layers": [1, 0, 1]}, "no_rope_layers has 3 entries for 40 layers"),
        ({"no_rope_layer_interval": 0}, r"no_rope_layer_interval must be an integer in \[1, .*, got 0"),
        ({"model_type": "granite", "residual_multiplier": -1}, "residual_multiplier must be a number in .*, got -1"),
        ({"model_type": "granite", "logits_scaling": 0}, "logits_scaling must be a number in .*, got 0"),
        (
            {"model_type": "phi3", "rope_scaling": LONGROPE | {"short_factor": [1, "2"]}},
            "short_factor must be a list of",
        ),
        ({"model_type": "phi3", "rope_scaling": LONGROPE | {"short_factor": [1]}}, "LongRoPE needs 4 factors, got 1"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.2}, "RoPE must turn an even number of 8 dimensions, got 1"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_wrong_values_of_a_familys_keys_are_named(given, message):
    with pytest.raises(cb.CheckpointError, match=message):
        ModelConfig.from_hugging_face({"model_type": "smollm3"} | SIZES | given)


@pytest.mark.parametrize(
    ("max_positions", "factors"), [(None, "long_factor"), (4097, "long_factor"), (4096, "short_factor")]
)
def test_longrope_has_one_set_of_factors_for_all_that_a_model_is_asked_to_take(max_positions, factors):
    raw = {"model_type": "phi3"} | SIZES | SCALED | {"max_position_embeddings": 131072, "rope_scaling": LONGROPE}
    config = ModelConfig.from_hugging_face(raw, max_positions=max_positions)
    assert config.max_positions == (max_positions or 131072)
    assert config.rope_divisors == tuple(LONGROPE[factors])
    frequencies, factor = inverse_frequencies(config.rope, 8, config.rope_divisors)
    np.testing.assert_allclose(frequencies, 10000.0 ** -np.array([0, 0.25, 0.5, 0.75]) / LONGROPE[factors], rtol=1e-6)
    assert factor == pytest.approx((1 + np.log(32) / np.log(4096)) ** 0.5)


def test_dimensions_that_rope_does_not_turn_stay_as_they_are():
    config = ModelConfig.from_hugging_face({"model_type": "phi3", "partial_rotary_factor": 0.5} | SIZES)
    cos, sin = rope_tables(config, 9).of_layer(config, 0)
    assert (cos[8, :2] != 1).all()
    assert (cos[8, 2:] == 1).all()
    assert (sin[8, 2:] == 0).all()


def test_a_gemma_configuration_as_published_leaves_out_shapes():
    ours = ModelConfig.from_hugging_face(
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
        }
    )
    assert (ours.vocab_size, ours.num_heads, ours.num_kv_heads, ours.head_dim) == (262208, 8, 4, 256)
    assert ours.embedding_scale == 2560**0.5


PEAK = """
import re, sys
import jax, numpy as np
import cacheblend_jax as cb
jax.block_until_ready(jax.numpy.zeros(8) + 1)
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
load_model = cb.load_model  # with all that it imports
before = peak()
model = load_model(sys.argv[1], dtype=sys.argv[2] or None)
weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
print((peak() - before) / weights)
"""


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("large")
    hidden, layers, vocabulary = 512, 24, 1000
    rng = np.random.default_rng(0)

    @functools.cache
    def matrix(*shape):
        return rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)

    names = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, hidden)}
    names |= {"self_attn.v_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden)}
    names |= {"mlp.gate_proj": (2048, hidden), "mlp.up_proj": (2048, hidden), "mlp.down_proj": (hidden, 2048)}
    names |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    tensors = {
        f"model.layers.{i}.{name}.weight": matrix(*shape) for i in range(layers) for name, shape in names.items()
    }
    tensors |= {"model.embed_tokens.weight": matrix(vocabulary, hidden), "model.norm.weight": matrix(hidden)}
    save_file(tensors, directory / "model.safetensors")
    config = OLD | {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": 2048}
    config |= {"num_hidden_layers": layers, "num_attention_heads": 8, "tie_word_embeddings": True, "dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize("dtype", ["", "float32"])
def test_peak_host_memory_stays_near_the_weights(large_checkpoint, dtype):
    command = [sys.executable, "-c", PEAK, str(large_checkpoint), dtype]
    ratio = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 0.9 < ratio < 1.3
