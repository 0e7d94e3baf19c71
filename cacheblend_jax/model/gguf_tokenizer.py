"""The tokenizer that a GGUF file's metadata describes, rebuilt as one of transformers' fast tokenizers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import Any

import numpy as np

from cacheblend_jax.errors import CheckpointError, is_whole_number, one_line
from cacheblend_jax.model.config_fields import shown
from cacheblend_jax.model.gguf_config import TOKENIZER, turn_ends
from cacheblend_jax.model.gguf_file import GgufFile

BYTE_LEVEL, SENTENCE_PIECE = "gpt2", "llama"
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # types of tokens
NEVER_MERGED = (UNKNOWN, CONTROL, BYTE)
SPACE = "▁"  # how SentencePiece writes one
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
# Mistral's since Nemo, whose files call themselves llama, too.
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
TEKKEN_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a text is split before its pieces are merged, by the name that the metadata gives: GPT-2's pattern after
# single digits, or a pattern of its own.
GPT2, DIGITS = "gpt-2", "digits"
SPLITS = {
    **dict.fromkeys(("default", "gpt-2", "gpt2"), GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"), LLAMA3_WORDS),
    "tekken": TEKKEN_WORDS,
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), QWEN2_WORDS),
}
# Those whose texts begin with BOS and whose vocabularies hold whole words; those whose texts are composed (NFC).
WHOLE_WORDS, COMPOSED = ("llama-bpe", "llama3", "llama-v3", "tekken"), ("qwen2", "deepseek-r1-qwen")
# No metadata but the model's name tells that tokens take the white space after them, except these: as llama.cpp has it.
PHI3, NEVER_STRIPPING = ("phi-3", "phi3"), ("<unk>", "<s>", "<|endoftext|>")
SPECIALS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def gguf_tokenizer(file: GgufFile) -> Any:
    """Returns the tokenizer of a file; `None` where it has none.

    Raises:
        CheckpointError: its kind is not supported, or it is damaged.
    """
    from transformers import PreTrainedTokenizerFast

    said = _Said(file)
    if said.get("model", "none") in ("none", "no_vocab"):
        return None
    tokens, types = said.tokens()
    specials = {ours: token for key, ours in SPECIALS.items() if (token := said.token(f"{key}_token_id", tokens))}
    try:
        backend = _backend(said, tokens, types)
        _add_tokens(backend, tokens, types, strip=said.is_phi3)
        backend.post_processor = _opening(said, tokens)
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            clean_up_tokenization_spaces=False,
            chat_template=said.text("tokenizer.chat_template"),
            **specials,
        )
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises nothing more particular
        raise CheckpointError(f"{file.path}: its tokenizer does not load: {one_line(error)}") from error


class _Said:
    """What the metadata says of the tokenizer, each value checked when it is read."""

    def __init__(self, file: GgufFile) -> None:
        self._path, self._metadata = file.path, file.metadata

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(TOKENIZER + key, default)

    def tokens(self) -> tuple[list[str], np.ndarray]:
        """Returns the tokens and their types, by id: those that end a turn are control tokens, whatever is stored."""
        tokens = self.texts("tokens")
        types = self.get("token_type")
        types = np.ones(len(tokens), np.int32) if types is None else types
        types = self.numbers("token_type", types, len(tokens)).copy()
        types[turn_ends(tokens)] = CONTROL
        return tokens, types

    @property
    def is_phi3(self) -> bool:
        name = self.text("general.name") or ""
        return any(mark in name.lower() for mark in PHI3)

    def texts(self, key: str) -> list[str]:
        value = self.get(key)
        if not isinstance(value, list):
            raise self.wrong(key, "a list of texts", value)
        return value

    def numbers(self, key: str, value: Any, count: int) -> np.ndarray:
        if not isinstance(value, np.ndarray) or len(value) != count:
            raise self.wrong(key, f"{count} numbers, one a token", value)
        return value

    def text(self, key: str) -> str | None:
        value = self._metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise CheckpointError(f"{self._path}: {key} must be text, got {shown(value)}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false", value)
        return value

    def token_id(self, key: str, tokens: list[str]) -> int | None:
        value = self.get(key)
        if value is not None and not is_whole_number(value, least=0, below=len(tokens)):
            raise self.wrong(key, f"the id of one of {len(tokens)} tokens", value)
        return value

    def token(self, key: str, tokens: list[str]) -> str | None:
        """Returns the token whose id stands there."""
        number = self.token_id(key, tokens)
        return None if number is None else tokens[number]

    def one_of(self, key: str, known: Iterable[str], default: str) -> str:
        value = self.get(key, default)
        if not isinstance(value, str) or value not in known:
            raise self.wrong(key, f"one of {', '.join(known)}", value)
        return value

    def wrong(self, key: str, expected: str, value: object) -> CheckpointError:
        return CheckpointError(f"{self._path}: {TOKENIZER}{key} must be {expected}, got {shown(value)}")


def _backend(said: _Said, tokens: list[str], types: np.ndarray) -> Any:
    if said.one_of("model", (BYTE_LEVEL, SENTENCE_PIECE), "") == BYTE_LEVEL:
        return _byte_level(said, tokens)
    return _sentence_piece(said, tokens, types)


def _byte_level(said: _Said, tokens: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = [_pair(said, merge) for merge in said.texts("merges")]
    name = said.one_of("pre", SPLITS, "default")
    split = SPLITS[name]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    for left, right in merges:  # tokenizers panics at others, which no handler of errors sees
        if not (left in vocabulary and right in vocabulary and left + right in vocabulary):
            raise said.wrong("merges", "pairs of tokens that make a token", f"{left} {right}")
    backend = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False, ignore_merges=name in WHOLE_WORDS))
    if name in COMPOSED:
        backend.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in (GPT2, DIGITS))]
    if split == DIGITS:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif split != GPT2:
        steps.insert(0, pre_tokenizers.Split(Regex(split), behavior="isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _pair(said: _Said, merge: str) -> tuple[str, str]:
    first, space, second = merge[1:].partition(" ")
    if not space:
        raise said.wrong("merges", "pairs with a space between", merge)
    return merge[:1] + first, second


def _sentence_piece(said: _Said, tokens: list[str], types: np.ndarray) -> Any:
    """SentencePiece's merging by scores, written as ranked merges, with bytes for what has no piece."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = said.numbers("scores", said.get("scores"), len(tokens))
    added = types == USER_DEFINED
    # The converter has written the spaces of added words as they are; in the text they are SentencePiece's by then.
    pieces = [token.replace(" ", SPACE) if is_added else token for token, is_added in zip(tokens, added, strict=True)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    ranks = np.lexsort((-np.asarray(scores, np.float64), ~added))  # added words first, then by score
    ranked = [pieces[number] for number in ranks[~np.isin(types[ranks], NEVER_MERGED)]]
    unknown = said.token("unknown_token_id", tokens)
    backend = Tokenizer(
        models.BPE(vocabulary, _merges(ranked, vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    has_start = said.flag("add_space_prefix", True)
    spaces = [normalizers.Replace(" ", SPACE)]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), *spaces] if has_start else spaces)
    ends = [decoders.Strip(" ", 1, 0)] if has_start else []
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    return backend


def _merges(ranked: list[str], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Returns every pair of pieces whose union is a piece: what SentencePiece merges, the best union first."""
    known = {piece: (vocabulary[piece], piece) for piece in ranked}
    lengths = sorted({len(piece) for piece in ranked})  # no others are tried: a damaged file may have very long pieces
    found: list[tuple[str, str]] = []
    for piece in ranked:
        pairs = []
        for cut in lengths[: bisect_left(lengths, len(piece))]:
            left = known.get(piece[:cut])
            if left is not None and (right := known.get(piece[cut:])) is not None:
                pairs.append((left, right))
        found += [(left, right) for (_, left), (_, right) in sorted(pairs)]
    return found


def _add_tokens(backend: Any, tokens: list[str], types: np.ndarray, *, strip: bool) -> None:
    """Makes control tokens and words that were added to the vocabulary known as such.

    Args:
        strip: whether they take the white space that follows them.
    """
    from tokenizers import AddedToken

    def added(token: str, is_special: bool) -> AddedToken:
        return AddedToken(token, normalized=False, special=is_special, rstrip=strip and token not in NEVER_STRIPPING)

    for kind in (UNKNOWN, CONTROL, USER_DEFINED):
        is_special = kind != USER_DEFINED
        chosen = [tokens[number] for number in np.flatnonzero(types == kind)]
        chosen = [token for token in chosen if is_special or " " not in token]  # runs of spaces are found by merging
        backend.add_tokens([added(token, is_special) for token in chosen if token])


def _opening(said: _Said, tokens: list[str]) -> Any:
    """Puts BOS before a text, and EOS after it, where the metadata or llama.cpp's rule for its kind says so."""
    from tokenizers import processors

    is_llama = said.get("model") == SENTENCE_PIECE or said.get("pre") in WHOLE_WORDS
    asked = {"bos": said.flag("add_bos_token", is_llama), "eos": said.flag("add_eos_token", False)}
    given = {name: said.token_id(f"{name}_token_id", tokens) for name, is_asked in asked.items() if is_asked}
    # By names of our own: those of a vocabulary's tokens may mean something in a template.
    ends = [{"id": name, "ids": [i], "tokens": [tokens[i]]} for name, i in given.items() if i is not None]
    words = processors.ByteLevel(trim_offsets=False)
    if not ends:
        return words
    names = [end["id"] for end in ends]
    frame = [name for name in ("bos", "$A", "eos") if name == "$A" or name in names]
    single = [f"{name}:0" for name in frame]
    pair = [*single, *(f"{name}:1".replace("$A", "$B") for name in frame)]
    template = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ends)
    return processors.Sequence([words, template]) if said.get("model") == BYTE_LEVEL else template
