"""Trains a demo model on the bundled corpus and writes it as a Hugging Face checkpoint.

    python scripts/train_demo_model.py [--out demo-model] [--work ~/demo-training]

Minutes on a GPU, about an hour on two CPU cores. Seeded; killed, it goes on from its last checkpoint in `--work`. The
bundled checkpoint was trained while this curriculum still changed: what it makes today is in docs/results.md.

A curriculum: recall and references on short texts, then documents of full length with sparse facts. The loss is on
every token; answers, and surnames that a resolved nickname tells ("Cobalt …"), weigh most. Training never sees a blend.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from cacheblend_jax.evaluation.corpus import (
    CITIES,
    COLOURS,
    DRINKS,
    NAMES,
    NICKNAMES,
    NUMBERS,
    PREFIX,
    Difficulty,
    Document,
    draw_document,
    split_words,
    vocabulary,
)
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.params import Params
from cacheblend_jax.model.rope import rope_tables
from cacheblend_jax.model.tensor_names import hugging_face_tensors
from cacheblend_jax.model.transformer import embedder, init_params, layer_at
from pallas_kernels import apply_rope

BOS, EOS, UNKNOWN = SPECIAL = ("<s>", "</s>", "<unk>")
WORDS = [*SPECIAL, *vocabulary()]
IDS = {word: index for index, word in enumerate(WORDS)}
HUGGING_FACE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": len(WORDS),
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "tie_word_embeddings": True,
    "bos_token_id": IDS[BOS],
    "eos_token_id": IDS[EOS],
    "dtype": "bfloat16",
}
CONFIG = ModelConfig.from_hugging_face(HUGGING_FACE, "float32")
VALUES = frozenset([*CITIES, *COLOURS, *DRINKS, *NUMBERS])
BACKGROUND_WEIGHT = 0.1  # of tokens that are neither answers nor told by a resolved nickname
READING_LAYERS = 3  # what a nickname stands for must be known after so many


@dataclass(frozen=True)
class Phase:
    """Part of the curriculum: batches of `batch_tokens`, of documents of one difficulty.

    It ends after `steps`, or before, as soon as `enough` of the answers across chunks (of all answers, while it has
    `reading_targets`) of the last `REPORT_EVERY` batches are right.
    """

    steps: int
    batch_tokens: int
    lengths: tuple[int, ...]  # buckets; documents are sorted into them
    difficulty: Difficulty
    enough: float = 2.0
    question_marks: bool = True
    reading_targets: bool = False
    number_targets: bool = False
    single_weight: float = 0.3  # of answers that one chunk holds
    blind: float = 0.5  # of the documents


_RECALL = Difficulty((2, 3), (0, 1), 3, 3, 0, 2, by_nickname=0.6, filler=False)
_REFERENCES = Difficulty((2, 3), (0, 1), 1, 4, 3, 2, by_nickname=0.9, filler=False)
_MORE = Difficulty((2, 4), (0, 1), 2, 5, 3, 4, filler=False)
_FILLED = Difficulty((4, 8), (16, 40), 3, 5, 3, 4)
CURRICULUM = (
    Phase(1500, 4096, (192,), _RECALL, 0.92, question_marks=False, reading_targets=True, single_weight=1.0, blind=1.0),
    Phase(1500, 4096, (224,), _REFERENCES, 0.9, question_marks=False, number_targets=True, blind=1.0),
    Phase(650, 4352, (304,), _MORE, number_targets=True),
    # From here on the learning rate falls.
    Phase(300, 6144, (384, 448, 512, 576), _FILLED),
    Phase(300, 6144, (640, 768, 896, 1024, 1152), Difficulty()),
    Phase(500, 4352, (304,), _MORE, number_targets=True),
    Phase(400, 6144, (640, 768, 896, 1024, 1152), Difficulty()),
)
FALLING_FROM = 3
REPORT_EVERY = 50
SAVE_EVERY = 200


def encode(document: Document, phase: Phase, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A document with all its questions and answers: ids, what each is to predict, its weight, and which are answers.

    `segment` is 0 for the context and counts the questions: each sees the context and itself. In part of the documents
    (`is_blind`), questions do not see the context in the reading layers, nor, where they need several chunks, sentences
    that tell whose a nickname is (`tells`): it must have been understood while reading, as larger models do, and not be
    looked up when asked.

    Targets are the next tokens, but that in phases with `reading_targets` the last word of a fact is to tell the fact's
    value, and a nickname whose it is: a model learns to recall from a place once it has learnt to gather there. With
    `number_targets` the names in a comparison are to tell their numbers, and a model learns to compare them.
    """
    words = [BOS, *split_words(PREFIX)]
    told: dict[int, str] = {}
    name_of: dict[str, str] = {}
    number_of: dict[str, str] = {}
    tells = [False] * len(words)
    for chunk in document.chunks:
        for sentence in chunk.split(". "):
            marks = split_words(sentence.rstrip(".") + ".")
            names, nicknames = ([word for word in marks if word in known] for known in (NAMES, NICKNAMES))
            if names and nicknames:
                name_of[nicknames[0]] = names[0]
            if marks[0] in NUMBERS:
                number_of[name_of[nicknames[0]]] = marks[0]
            if phase.reading_targets and (names or nicknames):
                gathered = [word for word in marks if word in VALUES]
                gathered += [name_of[nickname] for nickname in nicknames if marks[-2] in NICKNAMES]
                if gathered:
                    told[len(words) + len(marks) - 2] = gathered[rng.integers(len(gathered))]
            words += marks
            tells += [bool(names and nicknames)] * len(marks)
    resolvable = [before in NICKNAMES and word in NAMES for before, word in pairwise(words)]
    weights = [1.0 if known else BACKGROUND_WEIGHT for known in resolvable] + [0.0]
    context = len(words)
    segment = [0] * context
    answers = [False] * context
    is_across = [False] * context
    for number, question in enumerate(document.questions, 1):
        compare = question.kind == "compare"
        asked = split_words(question.text if phase.question_marks or compare else question.text.removesuffix("?"))
        if compare and phase.number_targets:
            told |= {len(words) + place: number_of[word] for place, word in enumerate(asked) if word in NAMES}
        words += [*asked, question.answer, EOS]
        weight = phase.single_weight if question.kind == "single" else 1.0
        weights += [0.0] * (len(asked) - 1) + [weight, BACKGROUND_WEIGHT, 0.0]
        answers += [False] * (len(asked) - 1) + [True, False, False]
        is_across += [question.kind != "single"] * (len(asked) + 2)
        segment += [number] * (len(asked) + 2)
    ids = np.array([IDS[word] for word in words], np.int32)
    targets = np.roll(ids, -1)
    for place, word in told.items():
        targets[place], weights[place] = IDS[word], 1.0
    return {
        "ids": ids,
        "targets": targets,
        "weights": np.array(weights, np.float32),
        "is_answer": np.array(answers),
        "is_across": np.array(is_across),
        "tells": np.pad(tells, (0, ids.size - context)),
        "segment": np.array(segment, np.int32),
        "is_blind": (np.array(segment) > 0) & (rng.random() < phase.blind),
    }


def batches(phase: Phase, seed: tuple[int, ...]) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of documents of like length, so that little is padding."""
    rng = np.random.default_rng(seed)
    waiting: dict[int, list] = {length: [] for length in phase.lengths}
    while True:
        encoded = encode(draw_document(rng, phase.difficulty), phase, rng)
        length = next((length for length in phase.lengths if encoded["ids"].size <= length), None)
        if length is None:
            continue
        waiting[length].append(encoded)
        if len(waiting[length]) == phase.batch_tokens // length:
            yield pad(waiting[length], length)
            waiting[length] = []


def pad(encoded: list[dict[str, np.ndarray]], length: int) -> dict[str, np.ndarray]:
    """Stacks encoded documents, padded with tokens of no weight."""
    return {name: np.stack([np.pad(one[name], (0, length - one[name].size)) for one in encoded]) for name in encoded[0]}


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, text: dict[str, jax.Array], reading: bool, block: int = 256
) -> jax.Array:
    """Attention that can be differentiated, of what `encode` lets each token see.

    Blocks of queries leave out the keys that none of them sees.
    """
    attended = []
    for start in range(0, q.shape[0], block):
        rows, keys = slice(start, start + block), slice(0, start + block)
        count = q[rows].shape[0]
        ours, theirs = text["segment"][rows, None], text["segment"][None, keys][:, : start + count]
        blind, across = text["is_blind"][rows, None], text["is_across"][rows, None]
        unseen = blind if reading else blind & across & text["tells"][None, keys]
        visible = (theirs == ours) | ((theirs == 0) & ~unseen)
        visible &= jnp.arange(start + count) <= start + jnp.arange(count)[:, None]
        seen = jax.nn.dot_product_attention(q[None, rows], k[None, keys], v[None, keys], mask=visible[None, None])
        attended.append(seen[0])
    return jnp.concatenate(attended)


def logits_of(params: Params, text: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Logits `[tokens, vocab]` of one text, by attention that can be differentiated: of the reading layers, and all."""
    cos, sin = rope_tables(CONFIG, text["ids"].shape[0]).of_layer(CONFIG, 0)

    def layers(hidden: jax.Array, start: int, stop: int, reading: bool) -> jax.Array:
        def body(hidden: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
            layer = layer_at(params, CONFIG, index)
            k, v = layer.keys_values(hidden)
            q, k = (apply_rope(x, cos, sin) for x in (layer.queries(hidden), k))
            return layer.finish(hidden, causal_attention(q, k, v, text, reading)), None

        return lax.scan(body, hidden, jnp.arange(start, stop))[0]

    around = embedder(params, CONFIG)
    read = layers(around.embed(text["ids"]), 0, READING_LAYERS, True)
    return around.logits(read), around.logits(layers(read, READING_LAYERS, CONFIG.num_layers, False))


def loss_of(params: Params, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted cross entropy, and what is worth printing.

    What a nickname stands for is to be known after the reading layers already: the layers above then deviate where it
    was resolved otherwise, as the layers of larger models do.
    """
    read, logits = jax.vmap(partial(logits_of, params))(batch)
    targets, weights, is_answer = batch["targets"], batch["weights"], batch["is_answer"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    resolvable = (weights == 1.0) & (batch["segment"] == 0)
    early = (optax.softmax_cross_entropy_with_integer_labels(read, targets) * resolvable).sum()
    early /= jnp.maximum(resolvable.sum(), 1)
    right = logits.argmax(-1) == targets

    def share(of: jax.Array) -> jax.Array:
        return (of * right).sum() / jnp.maximum(of.sum(), 1)

    report = {
        "answers": share(is_answer),
        "across": share(is_answer & batch["is_across"]),
        "blind": share(is_answer & batch["is_across"] & batch["is_blind"]),
        "read": share(resolvable),
        "early": early,
    }
    return (losses * weights).sum() / weights.sum() + 0.3 * early, report


def initial_params() -> Params:
    """Random parameters from which in-context recall emerges within 250 steps, where plain ones showed none in 450.

    Embeddings of standard deviation 1, not 0.02; the final norm keeps the logits that they give small. Layers add
    little at first, so that a token stays itself. And from layer 1 on, the queries of the first group start as the keys
    do: a token attends to earlier ones of its kind. Numbers differ by their size along one direction.
    """
    params = init_params(jax.random.key(0), CONFIG)
    by_head = (CONFIG.num_layers, CONFIG.hidden_size, CONFIG.num_kv_heads, -1, CONFIG.head_dim)
    kernels = {name: params.layers[name]["kernel"] for name in ("q_proj", "k_proj", "o_proj", "down_proj")}
    q, k = kernels["q_proj"].reshape(by_head), kernels["k_proj"].reshape(by_head)
    changed = {
        "q_proj": q.at[1:, :, 0].set(k[1:, :, 0]).reshape(kernels["q_proj"].shape),
        "o_proj": kernels["o_proj"] * 0.3,
        "down_proj": kernels["down_proj"] * 0.3,
    }
    layers = params.layers | {name: {"kernel": kernel} for name, kernel in changed.items()}
    embedding = params.embedder["embedding"] / 0.02
    sizes = jnp.linspace(-2.0, 2.0, len(NUMBERS))
    numbers = jnp.array([IDS[number] for number in NUMBERS])
    embedding = embedding.at[numbers].add(sizes[:, None] * jax.random.normal(jax.random.key(1), (CONFIG.hidden_size,)))
    around = {
        "embedding": embedding,
        "final_norm": {"scale": params.embedder["final_norm"]["scale"] / math.sqrt(CONFIG.hidden_size)},
    }
    return Params(params.embedder | around, layers)


def learning_rate(step: int, phase: int, step_of_phase: int, peak: float) -> float:
    """Warms up over the first steps, stays, and falls to a thirtieth over the last phases, along a cosine."""
    if phase < FALLING_FROM:
        return peak * min(1.0, (step + 1) / 50)
    steps = [each.steps for each in CURRICULUM[FALLING_FROM:]]
    done = (sum(steps[: phase - FALLING_FROM]) + step_of_phase) / sum(steps)
    return peak * (1 / 30 + (1 - 1 / 30) * 0.5 * (1 + math.cos(math.pi * done)))


def train(work: Path, peak: float) -> Params:
    """Runs the curriculum, from the last checkpoint in `work` if there is one."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.98), optax.add_decayed_weights(0.01)
    )
    params = initial_params()
    counts = {"step": 0, "phase": 0, "step_of_phase": 0}
    state: dict[str, Any] = {"params": params, "optimizer": optimizer.init(params), "counts": counts}

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Params, optimizer_state: Any, batch: dict[str, jax.Array], rate: jax.Array) -> tuple:
        (loss, report), gradients = jax.value_and_grad(loss_of, has_aux=True)(params, batch)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        params = jax.tree.map(lambda leaf, change: leaf - rate * change, params, updates)
        return params, optimizer_state, report | {"loss": loss}

    with ocp.training.Checkpointer(work.absolute()) as checkpointer:
        if checkpointer.latest is not None:
            state = checkpointer.load(checkpointer.latest, state)
        counts = {name: int(count) for name, count in state["counts"].items()}
        params, optimizer_state = state["params"], state["optimizer"]

        def save() -> None:
            checkpointer.save(counts["step"], {"params": params, "optimizer": optimizer_state, "counts": counts})

        bar = tqdm(initial=counts["step"], total=sum(phase.steps for phase in CURRICULUM))
        while counts["phase"] < len(CURRICULUM):
            phase = CURRICULUM[counts["phase"]]
            recent: list[dict[str, float]] = []
            source = batches(phase, (counts["phase"], counts["step_of_phase"]))
            while counts["step_of_phase"] < phase.steps:
                rate = learning_rate(counts["step"], counts["phase"], counts["step_of_phase"], peak)
                params, optimizer_state, report = update(params, optimizer_state, next(source), jnp.float32(rate))
                recent.append({name: float(value) for name, value in report.items()})
                counts["step"] += 1
                counts["step_of_phase"] += 1
                bar.update()
                if counts["step"] % SAVE_EVERY == 0:
                    save()
                if len(recent) == REPORT_EVERY:
                    means = {name: np.mean([one[name] for one in recent]) for name in report}
                    said = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
                    bar.write(f"phase {counts['phase'] + 1}, step {counts['step']}: {said}")
                    recent = []
                    if means["answers" if phase.reading_targets else "across"] >= phase.enough:
                        break
            counts |= {"phase": counts["phase"] + 1, "step_of_phase": 0}
        bar.close()
        if counts["step"] % SAVE_EVERY:
            save()
    return params


def write_checkpoint(params: Params, directory: Path) -> None:
    """Writes weights (bfloat16), configuration and tokenizer, as transformers reads them."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = hugging_face_tensors(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), CONFIG)
    stored = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)
    (directory / "config.json").write_text(json.dumps(HUGGING_FACE, indent=1) + "\n")
    tokenizer().save_pretrained(directory)


def tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer of the corpus; what it has not got is `<unk>`."""
    core = Tokenizer(models.WordLevel(IDS, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, IDS[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=HUGGING_FACE["max_position_embeddings"],
        chat_template="{{ bos_token }}{% for message in messages %}{{ message['content'] }} {% endfor %}",
        system_text=PREFIX,  # what stood before every document in training
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-model"))
    parser.add_argument("--work", type=Path, default=Path("~/demo-training"))
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    arguments = parser.parse_args()
    work = arguments.work.expanduser()
    write_checkpoint(train(work, arguments.learning_rate), arguments.out)


if __name__ == "__main__":
    main()
