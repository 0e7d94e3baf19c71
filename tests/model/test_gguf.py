"""GGUF files: the same model as in Hugging Face form, the tokenizer of the metadata, and refusals on one line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from conftest import HF, refusal
from gguf_files import byte_level_metadata, byte_level_tokenizer, from_hugging_face, write_gguf
from safetensors.numpy import load_file, save_file

import cacheblend_jax as cb
from cacheblend_jax.model import gguf_tokenizer, tensor_reading, weights_digest
from cacheblend_jax.model.gguf_file import read_gguf
from cacheblend_jax.model.gguf_tensors import GgufTensors, NamedTensor
from cacheblend_jax.model.tensor_names import hugging_face_tensors

CASES = {
    "llama2": "llama",
    "llama3": "llama",
    "llama_linear": "llama",
    "llama_yarn": "llama",
    "qwen2_full": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "olmo2": "olmo2",
    "granite": "granite",
    "smollm3": "smollm3",
    "qwen3_moe": "qwen3moe",
    "mixtral": "llama",
    "phi3": "phi3",
    "phi3_longrope": "phi3",
}

refused = partial(refusal, shorter_than=600)


@pytest.mark.parametrize("case", CASES)
def test_a_converted_checkpoint_is_the_same_model(case, tmp_path):
    path = from_hugging_face(HF / case, tmp_path / "model.gguf", CASES[case])
    wanted, loaded = cb.load_model(HF / case, dtype="float32"), cb.load_model(path)
    # Rounded to float32 in the file, and not in it: every published Gemma has the scale of its heads' dimension.
    assert loaded.config.rms_norm_eps == pytest.approx(wanted.config.rms_norm_eps, rel=1e-6)
    kept = {"rms_norm_eps": wanted.config.rms_norm_eps}
    if case in ("gemma2", "gemma3"):
        assert loaded.config.attention_scale == wanted.config.head_dim**-0.5
        kept["attention_scale"] = wanted.config.attention_scale
    if case == "qwen3_moe":  # llama.cpp takes it for granted
        assert loaded.config.experts_sum_to_one
        kept["experts_sum_to_one"] = False
    if case == "phi3_longrope":
        assert loaded.config.rope_divisors == pytest.approx(wanted.config.rope_divisors)
        kept["rope_divisors"] = wanted.config.rope_divisors
    assert replace(loaded.config, **kept) == wanted.config
    assert loaded.tokenizer is None
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-7), loaded.params, wanted.params)


def test_rows_are_dequantised_and_reordered(tmp_path):
    kinds = {"token_embd.weight": "Q8_0", "attn_q.weight": "Q4_0", "attn_k.weight": "Q4_1", "attn_v.weight": "Q5_0"}
    kinds |= {"attn_output.weight": "Q5_1", "ffn_gate.weight": "F16", "ffn_up.weight": "BF16"}
    path = from_hugging_face(HF / "llama2", tmp_path / "model.gguf", "llama", kinds)
    loaded = cb.load_model(path)
    assert loaded.config.dtype == "float32"
    actual = hugging_face_tensors(loaded.params, loaded.config)
    for name, tensor in load_file(HF / "llama2" / "model.safetensors").items():
        tensor = np.asarray(tensor, np.float32)
        # Every quantisation here works along a row, so that it may come before or after rows are reordered.
        ours = {"embed_tokens": "Q8_0", "q_proj": "Q4_0", "k_proj": "Q4_1", "v_proj": "Q5_0", "o_proj": "Q5_1"}
        ours |= {"gate_proj": "F16", "up_proj": "BF16"}
        kind = gguf.GGMLQuantizationType[next((kind for part, kind in ours.items() if part in name), "F32")]
        np.testing.assert_array_equal(actual[name], gguf.dequantize(gguf.quantize(tensor, kind), kind), err_msg=name)


def test_whole_files_of_half_precision_stay_so(tmp_path):
    kinds = dict.fromkeys(("embd.weight", "_q.weight", "_k.weight", "_v.weight", "output.weight"), "BF16")
    assert (
        cb.load_model(from_hugging_face(HF / "llama2", tmp_path / "a.gguf", "llama", kinds)).config.dtype == "bfloat16"
    )


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_super_blocks_are_read(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    _, size = gguf.GGML_QUANT_SIZES[kind]
    rows = np.random.default_rng(0).integers(0, 60, (3, 2 * size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("rows", rows, raw_dtype=kind)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    stored = read_gguf(tmp_path / "a.gguf").tensors["rows"]
    assert stored.shape == (3, 512)
    assert stored.row_bytes == 2 * size
    with GgufTensors(stored.path, {"rows": NamedTensor(stored)}) as tensors:
        np.testing.assert_array_equal(tensors.get_slice("rows")[1:3], gguf.dequantize(rows[1:], kind))


def split_in_two(tmp_path: Path) -> list[Path]:
    whole = read_gguf(from_hugging_face(HF / "llama2", tmp_path / "whole.gguf", "llama"))
    names = sorted(whole.tensors)
    reader = {tensor.name: tensor.data for tensor in gguf.GGUFReader(whole.path).tensors}
    paths = []
    for number, part in enumerate((names[:5], names[5:])):
        said = {"split.no": number, "split.count": 2, "split.tensors.count": len(names)}
        said |= {key: value for key, value in whole.metadata.items() if key.startswith("llama.") and number == 0}
        path = tmp_path / f"model-0000{number + 1}-of-00002.gguf"
        paths.append(write_gguf(path, "llama", said, {name: np.array(reader[name]) for name in part}))
    return paths


def test_parts_are_one_model(tmp_path):
    first, second = split_in_two(tmp_path)
    wanted = cb.load_model(HF / "llama2", dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, cb.load_model(first).params, wanted.params)
    assert cb.load_model(second).fingerprint == cb.load_model(first).fingerprint
    renamed = first.rename(tmp_path / "model.gguf")
    assert "is one of 2 parts; their names must end in" in refused(renamed)
    renamed.rename(first)
    second.unlink()
    assert f"{second} is missing: the model is in 2 parts" in refused(first)


def test_the_fingerprint_is_of_the_file(tmp_path):
    path = from_hugging_face(HF / "llama2", tmp_path / "a.gguf", "llama")
    copy = tmp_path / "other" / "a.gguf"
    copy.parent.mkdir()
    copy.write_bytes(path.read_bytes())
    other = from_hugging_face(HF / "llama2", tmp_path / "b.gguf", "llama", {"attn_q.weight": "Q8_0"})
    fingerprints = [cb.load_model(each).fingerprint for each in (path, copy, other)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


@pytest.mark.parametrize("suffix", [".gguf", ""])
def test_files_in_one_directory_are_remembered_apart(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(weights_digest, "REMEMBERED_BYTES", 0)
    monkeypatch.setattr(weights_digest, "SETTLED_SECONDS", -1000)  # files as new as these are believed
    kinds = [{}, {"attn_q.weight": "Q8_0"}]
    paths = [from_hugging_face(HF / "llama2", tmp_path / f"{i}{suffix}", "llama", kind) for i, kind in enumerate(kinds)]
    fingerprints = [cb.load_model(path).fingerprint for path in paths]
    monkeypatch.setattr(weights_digest.WeightFiles, "_computed", lambda self: pytest.fail("hashed again"))
    assert [cb.load_model(path).fingerprint for path in paths] == fingerprints


TEXTS = [
    "the store keeps 1234 checksums",
    "  naïve 日本語 🙂\n\n\tand don't 42",
    "",
    "<|im_start|>user\nhi<|im_end|>\n",
    "e\u0301 \u00a0x\r\n",
]


def test_a_byte_level_tokenizer_is_rebuilt(tmp_path):
    tiny = byte_level_tokenizer()
    path = from_hugging_face(HF / "llama2", tmp_path / "a.gguf", "llama", **byte_level_metadata(tiny))
    assert "320 tokens, but 160 rows of embeddings" in refused(path)
    tokenizer, model = load_wide(tmp_path, byte_level_metadata(tiny))
    for text in TEXTS:
        assert tokenizer.encode(text) == tiny.encode(text).ids, text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_token, tokenizer.eos_token_id, tokenizer.unk_token_id) == ("<|im_start|>", 2, 0)
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "one"}], tokenize=False)
    assert rendered == "<|im_start|>one<|im_end|>"
    assert model.stop_token_ids == (0, 2)


def load_wide(tmp_path: Path, metadata: dict) -> tuple:
    """Loads a model with 320 rows of embeddings, and the tokenizer of the metadata."""
    source = tmp_path / "wide"
    if not source.exists():
        source.mkdir()
        tensors = load_file(HF / "llama2" / "model.safetensors")
        for name in {"model.embed_tokens.weight", "lm_head.weight"} & tensors.keys():
            tensors[name] = np.concatenate([tensors[name]] * 2)
        save_file(tensors, source / "model.safetensors")
        (source / "config.json").write_text((HF / "llama2" / "config.json").read_text())
    model = cb.load_model(from_hugging_face(source, tmp_path / "wide.gguf", "llama", **metadata))
    return model.tokenizer, model


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "a 12b's", ["a", "Ġ12", "b", "'s"]),
        ("smollm", "a 12b's", ["a", "Ġ", "1", "2", "b", "'s"]),
        ("llama-bpe", "A 1234'S\n\n", ["A", "Ġ", "123", "4", "'S", "ĊĊ"]),
        ("tekken", "HelloWORLD 12a//\n", ["Hello", "WORLD", "Ġ", "1", "2", "a", "//Ċ"]),
        ("qwen2", "A 123e\u0301", ["A", "Ġ", "1", "2", "3", "Ã©"]),
    ],
)
def test_texts_are_split_by_the_name_of_their_kind(pre, text, words, tmp_path):
    tokenizer, _ = load_wide(tmp_path, byte_level_metadata(byte_level_tokenizer(), pre))
    backend = tokenizer.backend_tokenizer
    text = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
    assert [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == words


def test_llama3_and_tekken_take_whole_words_of_its_vocabulary_that_no_merges_make(tmp_path):
    for pre, ids in (("llama-bpe", [319]), ("tekken", [319]), ("gpt-2", [4, 3, 4])):
        said = byte_level_metadata(byte_level_tokenizer(), pre)
        tokens = said["tokenizer.ggml.tokens"]
        word = tokens[4] + tokens[3] + tokens[4]
        said["tokenizer.ggml.tokens"] = [*tokens[:-1], word]
        with pytest.raises(cb.CheckpointError, match="merges must be pairs of tokens that make a token, got"):
            load_wide(tmp_path, said)
        said["tokenizer.ggml.merges"].pop()
        assert load_wide(tmp_path, said)[0].encode(word, add_special_tokens=False) == ids


def sentence_piece_metadata(**changes) -> dict:
    """A vocabulary with scores, as SentencePiece's BPE has it: what has a higher score is merged first."""
    pieces = {"ab": -1, "▁c": -2, "bc": -3, "▁ab": -4, "▁": -5, "a": -6, "b": -7, "c": -8, "\n": -9}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "  ", "<tag>"]
    scores = [0.0] * 259 + [float(score) for score in pieces.values()] + [-1000.0] * 2
    said = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [4, 4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return said | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def test_a_vocabulary_with_scores_is_merged_by_them(tmp_path):
    tokenizer, _ = load_wide(tmp_path, sentence_piece_metadata())

    def tokens(text):
        return tokenizer.convert_ids_to_tokens(tokenizer.encode(text))

    assert tokens("abc") == ["<s>", "▁ab", "c"]  # ab before bc, then with what stands before it
    assert tokens("c bc") == ["<s>", "▁c", "▁", "bc"]
    assert tokens("cé") == ["<s>", "▁c", "<0xC3>", "<0xA9>"]
    assert tokens("a<tag>b</s>") == ["<s>", "▁", "a", "<tag>", "▁", "b", "</s>"]
    assert tokens("a  b") == ["<s>", "▁", "a", "▁▁", "b"]
    assert tokenizer.decode(tokenizer.encode("abc é c"), skip_special_tokens=True) == "abc é c"
    bare, _ = load_wide(tmp_path, sentence_piece_metadata(add_space_prefix=False, add_bos_token=False))
    assert bare.convert_ids_to_tokens(bare.encode("ab  c")) == ["ab", "▁▁", "c"]


@pytest.mark.parametrize(("model_name", "strips"), [("Phi3", True), ("phi-3.5 mini", True), ("Other", False)])
def test_ends_of_turns_end_answers_whatever_their_type_and_phi3_takes_white_space_after_tokens(
    model_name, strips, tmp_path
):
    said = sentence_piece_metadata() | {"general.name": model_name}
    for key, value in (("tokens", "<|end|>"), ("scores", -1000.0), ("token_type", 4)):  # which do not tell of its end
        said[f"tokenizer.ggml.{key}"].append(value)
    tokenizer, model = load_wide(tmp_path, said)
    end = len(said["tokenizer.ggml.tokens"]) - 1
    assert set(model.stop_token_ids) == {2, end}
    assert tokenizer.decode([262, end], skip_special_tokens=True) == tokenizer.decode([262])
    for token, taken in (("<|end|>", strips), ("<tag>", strips), ("<s>", False)):
        spaced, bare = (tokenizer.encode(f"{token}{space}ab", add_special_tokens=False) for space in (" \n ", ""))
        assert (spaced == bare) == taken


@pytest.mark.parametrize("name", ["$A", "a:b", "<0x00>"])
def test_tokens_around_a_text_may_have_any_name(name, tmp_path):
    said = sentence_piece_metadata(add_eos_token=True)
    said["tokenizer.ggml.tokens"][1:3] = [name, f"{name}:"]
    tokenizer, _ = load_wide(tmp_path, said)
    assert tokenizer.encode("ab") == [1, 262, 2]
    assert tokenizer.encode("ab", "c") == [1, 262, 2, 1, 260, 2]


def test_a_very_long_piece_is_cut_only_where_a_piece_may_end():
    cuts = 0

    class Piece(str):
        def __getitem__(self, part):
            nonlocal cuts
            cuts += 1
            return super().__getitem__(part)

    pieces = ["a", "b", "ab", Piece("ab" * 5000)]
    assert gguf_tokenizer._merges(pieces, {piece: i for i, piece in enumerate(pieces)}) == [("a", "b")]
    assert 0 < cuts < 10


BAD_METADATA = [
    ({"llama.attention.causal": False}, "llama.attention.causal must be true"),
    ({"llama.embedding_length": 33}, "shape"),
    ({"llama.attention.head_count": 0}, "num_attention_heads must be an integer in"),
    ({"llama.attention.head_count": "4"}, "num_attention_heads must be an integer in"),
    ({"llama.block_count": 2**31}, "num_hidden_layers must be an integer in"),
    ({"llama.attention.head_count_kv": [2, 1]}, "num_key_value_heads must be an integer in"),
    ({"llama.attention.value_length": 4}, "keys of 8 and values of 4 dimensions are not supported"),
    ({"llama.rope.dimension_count": 4}, "RoPE over 4 of 8 dimensions is not supported"),
    ({"llama.rope.scaling.type": "dynamic"}, "RoPE type 'dynamic' is not supported"),
    ({"llama.rope.scaling.type": "yarn"}, "RoPE type 'yarn' needs a factor"),
    ({"llama.expert_count": 8}, "are missing, among them model.layers.0.block_sparse_moe.experts.0.w1.weight"),
    ({"llama.expert_count": 8, "llama.expert_gating_func": 2}, "llama.expert_gating_func 2 is not supported, only 1"),
    ({"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": ["a"]}, "model must be one of gpt2, llama, got 'bert'"),
    ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": 7}, "tokens must be a list of texts, got 7"),
    (byte_level_metadata(byte_level_tokenizer(), "no-such") | {"tokenizer.ggml.tokens": ["a", "b", "c"]}, "token_type"),
    (sentence_piece_metadata(tokens=["a"], scores=[1.0], token_type=[1]), "bos_token_id must be the id of one of 1"),
]


def test_olmo3_whose_files_call_themselves_olmo2_is_refused_for_its_windows(tmp_path):
    windows = {"olmo2.attention.sliding_window": 8}
    assert "olmo2.attention.sliding_window 8 is not supported" in refused(
        from_hugging_face(HF / "olmo2", tmp_path / "a.gguf", "olmo2", **windows)
    )


@pytest.mark.parametrize(("metadata", "message"), BAD_METADATA, ids=lambda value: str(value)[:50])
def test_metadata_is_checked(metadata, message, tmp_path):
    path = from_hugging_face(HF / "llama2", tmp_path / "a.gguf", "llama", **metadata)
    said = refused(path)
    assert message in said
    assert str(path) in said


def test_what_is_unknown_is_named_with_what_is_known(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", "falcon", {}, {"x": np.zeros((2, 2), np.float32)})
    known = "llama, qwen2, qwen3, qwen3moe, phi3, gemma2, gemma3, olmo2, granite, smollm3"
    assert f"architecture 'falcon' is not supported; supported: {known}" in refused(path)
    assert "pre must be one of default, gpt-2" in unknown_split(tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    kind = gguf.GGMLQuantizationType.IQ2_XS
    writer.add_tensor("x", np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), raw_dtype=kind)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    assert "quantisation IQ2_XS of 'x' is not supported; supported: F32, F16" in refused(tmp_path / "b.gguf")


def unknown_split(tmp_path: Path) -> str:
    with pytest.raises(cb.CheckpointError) as error:
        load_wide(tmp_path, byte_level_metadata(byte_level_tokenizer(), "no-such"))
    return str(error.value)


def test_factors_of_rope_that_are_not_llama3s_are_refused(tmp_path):
    path = from_hugging_face(HF / "llama3", tmp_path / "a.gguf", "llama")
    content = path.read_bytes()
    stored = read_gguf(path).tensors["rope_freqs.weight"]
    own = np.linspace(1, 9, stored.shape[0], dtype="<f4").tobytes()
    path.write_bytes(content[: stored.offset] + own + content[stored.end :])
    assert "the factors in rope_freqs.weight are not those of Llama 3" in refused(path)


@pytest.fixture
def nothing_allocated(monkeypatch):
    def allocate(*_):
        raise AssertionError("allocated")

    monkeypatch.setattr(tensor_reading, "aligned_empty", allocate)


def test_a_file_that_is_cut_off_is_named(tmp_path, nothing_allocated):
    path = from_hugging_face(HF / "llama2", tmp_path / "a.gguf", "llama", **sentence_piece_metadata())
    content = path.read_bytes()
    for size in [0, 1, 4, 8, 20, *range(24, len(content) - 64, len(content) // 60)]:
        path.write_bytes(content[:size])
        assert f"{path} is not a readable GGUF file" in refused(path)


def test_counts_are_checked_before_anything_is_made_of_them(tmp_path, nothing_allocated):
    path = from_hugging_face(HF / "llama2", tmp_path / "a.gguf", "llama", **sentence_piece_metadata())
    content = path.read_bytes()
    huge = (2**62).to_bytes(8, "little")
    tokens = content.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
    scores = content.index(b"tokenizer.ggml.scores") + len("tokenizer.ggml.scores") + 8
    places = {8: "counts 4611686018427387904 tensors", 16: "counts 4611686018427387904 keys", 24: "cut off"}
    places |= {tokens: "counts 4611686018427387904 texts", scores: "counts 4611686018427387904 numbers"}
    for place, message in places.items():
        path.write_bytes(content[:place] + huge + content[place + 8 :])
        assert message in refused(path)


def test_damage_anywhere_in_the_header_is_an_error_or_harmless(tmp_path):
    path = from_hugging_face(HF / "llama2", tmp_path / "a.gguf", "llama")
    content = bytearray(path.read_bytes())
    begin = min(tensor.offset for tensor in read_gguf(path).tensors.values())
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(content)
        for place in rng.integers(0, begin, 3):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            cb.load_model(path)
        except cb.CheckpointError as error:
            assert len(str(error).splitlines()) == 1  # noqa: PT017 (a damaged byte may be harmless)


def test_values_that_are_no_numbers_are_found(tmp_path):
    path = from_hugging_face(HF / "llama2", tmp_path / "a.gguf", "llama")
    content, stored = path.read_bytes(), read_gguf(path).tensors["blk.1.ffn_up.weight"]
    path.write_bytes(content[: stored.offset] + b"\xff" * 4 + content[stored.offset + 4 :])
    assert "model.layers.1.mlp.up_proj.weight holds NaN or infinity" in refused(path)


def test_a_missing_package_is_named_with_its_install_line(tmp_path, monkeypatch):
    path = from_hugging_face(HF / "llama2", tmp_path / "a.gguf", "llama")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "needs the package gguf: install it with pip install 'cacheblend-jax[gguf]'" in refused(path)


@pytest.mark.parametrize("name", ["sha256-0123abcd", "MODEL.GGUF"])
def test_a_file_is_known_by_how_it_begins(name, tmp_path):
    path = from_hugging_face(HF / "llama2", tmp_path / "a.gguf", "llama")
    renamed = path.rename(tmp_path / name)
    assert cb.load_model(renamed).config.num_layers == 4


def test_what_cannot_be_loaded_points_to_the_file_that_can(tmp_path):
    path = from_hugging_face(HF / "llama2", tmp_path / "a.gguf", "llama")
    assert "config.json is missing: to load a.gguf, pass that file" in refusal(tmp_path)
    path.unlink()
    assert "which holds one, or a GGUF file" in refusal(tmp_path)
    assert "pass a checkpoint's directory, a GGUF file or a hub id" in refusal(HF / "llama2" / "model.safetensors")


def test_a_path_that_is_no_file_is_named():
    assert "model 'nowhere.gguf' is not a file" in refused(Path("nowhere.gguf"))


PEAK = """
import re, sys
import jax, numpy as np, gguf
import cacheblend_jax as cb
jax.block_until_ready(jax.numpy.zeros(8) + 1)
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
load_model = cb.load_model  # with all that it imports
before = peak()
model = load_model(sys.argv[1])
weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
print((peak() - before) / weights)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_peak_host_memory_stays_near_the_dequantised_weights(tmp_path):
    hidden, middle, layers = 512, 2048, 8
    kind = gguf.GGMLQuantizationType.Q8_0
    rows = gguf.quantize(np.random.default_rng(0).standard_normal((middle, middle), np.float32), kind)
    shapes = {"attn_q": (hidden, hidden), "attn_k": (hidden, hidden), "attn_v": (hidden, hidden)}
    shapes |= {"attn_output": (hidden, hidden), "ffn_gate": (middle, hidden), "ffn_up": (middle, hidden)}
    shapes |= {"ffn_down": (hidden, middle)}
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    config = json.loads((HF / "llama2" / "config.json").read_text())
    config |= {"hidden_size": hidden, "intermediate_size": middle, "num_hidden_layers": layers}
    for key, value in (("embedding_length", hidden), ("feed_forward_length", middle), ("block_count", layers)):
        writer.add_uint32(f"llama.{key}", value)
    for key, value in (("context_length", 64), ("attention.head_count", 8)):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)

    def add(name: str, outputs: int, inputs: int) -> None:
        writer.add_tensor(name, np.ascontiguousarray(rows[:outputs, : inputs // 32 * 34]), raw_dtype=kind)

    add("token_embd.weight", middle, hidden)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(layers):
        for name, shape in shapes.items():
            add(f"blk.{layer}.{name}.weight", *shape)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(hidden, np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    command = [sys.executable, "-c", PEAK, str(tmp_path / "a.gguf")]
    ratio = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 0.9 < ratio < 1.3
