import json
import re
from dataclasses import replace

import numpy as np
import pytest

import cacheblend_jax as cb
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.evaluation import check_layer, insights, metrics, plots
from cacheblend_jax.evaluation.corpus import (
    KINDS,
    NAMES,
    NICKNAMES,
    PREFIX,
    Difficulty,
    draw_document,
    examples,
    split_words,
    vocabulary,
)
from cacheblend_jax.evaluation.datasets import SEED, Row, bundled_rows, load_rows
from cacheblend_jax.evaluation.evaluator import Evaluator
from cacheblend_jax.evaluation.settings import Setting
from cacheblend_jax.evaluation.summary import of_all_kinds, summarize
from cacheblend_jax.model import KVCache
from cacheblend_jax.model.demo import demo_directory

HKVD, RANDOM = Setting("blend", "hkvd", 0.15), Setting("blend", "random", 0.15)


@pytest.fixture(scope="module")
def demo():
    return cb.load_model("demo", dtype="float32")


def test_documents_are_as_long_as_promised_and_define_before_use():
    rng = np.random.default_rng(3)
    known = set(vocabulary())
    for _ in range(100):
        document = draw_document(rng)
        lengths = [len(split_words(chunk)) for chunk in document.chunks]
        assert 6 <= len(lengths) <= 12
        assert min(lengths) >= 32
        assert max(lengths) <= 104  # a sentence may go over
        assert set(split_words(" ".join(document.chunks))) <= known
        for question in document.questions:
            assert set(split_words(question.text)) | {question.answer} <= known
            if question.kind == "reference":
                definition, use = question.chunks
                assert definition < use
                assert question.answer in document.chunks[use]
                name = next(word for word in split_words(question.text) if word in NAMES)
                assert name in split_words(document.chunks[definition])
                assert name not in split_words(document.chunks[use])  # nothing there says whose the fact is


def sentences_of(example):
    return [split_words(sentence) for chunk in example.chunks for sentence in chunk.split(". ")]


def people_of(example):
    """Who has which nickname, by the sentences that define them."""
    nicknames = {}
    for words in sentences_of(example):
        words = [word for word in words if word != "."]
        if words[0] in NAMES and words[-1] in NICKNAMES:
            nicknames[words[-1]] = words[0]
    return nicknames


def test_a_comparison_is_right_and_needs_both_numbers():
    for example in examples("compare", 50, 1):
        nicknames, numbers = people_of(example), {}
        for words in sentences_of(example):
            if words[0].isdigit():
                nickname = next(word for word in words if word in NICKNAMES)
                numbers[nicknames[nickname]] = int(words[0])
        asked = [word for word in split_words(example.question.text) if word in NAMES]
        assert len(asked) == 2
        assert example.question.answer == max(asked, key=numbers.__getitem__)


def test_nothing_but_the_resolved_nickname_tells_whose_a_fact_is():
    """All people of a document have the same told of them, each once."""
    for example in examples("reference", 50, 1):
        asked = next(word for word in split_words(example.question.text) if word in NAMES)
        nicknames = people_of(example)
        nickname = next(nickname for nickname, name in nicknames.items() if name == asked)
        use = example.chunks[example.question.chunks[1]]
        assert re.search(rf"\b{example.question.answer}\b[^.]*\b{nickname}\.", use)
        kinds = {"car": r"The \w+ car was given to", "office": r"(\w+ is now home to|The office in \w+ belongs to)"}
        told = next(form for word, form in kinds.items() if f"{word} " in example.question.text)
        of = re.findall(told + r" (\w+)", " ".join(example.chunks))
        of = [match if isinstance(match, str) else match[-1] for match in of]
        assert sorted(of) == sorted(nicknames)


def test_examples_follow_from_their_seed():
    for kind in KINDS:
        assert examples(kind, 3, 8) == examples(kind, 3, 8)
        assert examples(kind, 3, 8) != examples(kind, 3, 9)


def test_the_bundled_tokenizer_knows_every_word_and_splits_as_the_corpus_does(demo):
    tokenizer = demo.tokenizer
    for example in examples("compare", 5, 0):
        for text in (*example.chunks, example.question.text, PREFIX):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.convert_ids_to_tokens(ids) == split_words(text)
            assert tokenizer.decode(ids) == text


def test_blend_restores_what_reuse_loses(demo):
    """The point of it all, in small: fails where blend's advantage over reuse or over random is gone."""
    less = Setting("blend", "hkvd", 0.1)
    settings = [Setting("full"), Setting("reuse"), HKVD, less, RANDOM]
    difficulty = Difficulty(num_chunks=(7, 7), chunk_words=(48, 56))
    rows = [
        replace(row, chunks=example.chunks, question=example.question.text, answers=(example.question.answer,))
        for row, example in zip(bundled_rows(1) * 24, examples("reference", 24, SEED, difficulty), strict=False)
    ]
    evaluator = Evaluator(demo, rows, max_new_tokens=2)
    records = [record for row in rows for record in evaluator.evaluate_row(row, settings)]
    lines = of_all_kinds(summarize(records, [setting.label for setting in settings]))
    right = {label: line["exact_match"] for label, line in lines.items()}
    assert right["full"] >= 0.95
    assert right[HKVD.label] >= right["full"] - 0.1
    assert right[less.label] >= right["full"] - 0.05
    assert right["reuse"] <= 0.6
    assert right[RANDOM.label] <= right[HKVD.label] - 0.2
    for measure, over_random in (("kv_deviation", 0.75), ("attention_deviation", 0.8)):
        hkvd, random, reuse = (lines[label][measure] for label in (HKVD.label, RANDOM.label, "reuse"))
        assert hkvd < over_random * random, measure
        assert random < reuse, measure
    assert lines[HKVD.label]["kl"] < lines["reuse"]["kl"]
    assert lines["full"]["kl"] == lines["full"]["attention_deviation"] == 0.0


@pytest.mark.live
def test_live_transformers_loads_the_bundled_model_and_answers_the_same(demo):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(demo_directory(), dtype=torch.float32).eval()
    engine = cb.Engine(demo)
    for example in (example for kind in KINDS for example in examples(kind, 2, 11)):
        prompt = cb.Prompt.to_answer(demo.tokenizer, example.chunks, example.question.text)
        out = engine.prefill(prompt, "full")
        ids = torch.from_numpy(out.token_ids.astype(np.int64))[None]
        with torch.no_grad():
            logits = peer(ids, logits_to_keep=1).logits[0, -1].numpy()
        np.testing.assert_allclose(out.logits, logits, rtol=1e-3, atol=1e-3)
        answer = peer.generate(ids, max_new_tokens=2, do_sample=False)[0, ids.shape[1] :]
        ours = engine.complete(out, max_new_tokens=2, stop_token_ids=())
        assert answer.tolist() == ours.token_ids


def test_answers_are_normalised_as_squad_does():
    assert metrics.normalize_answer("The  Exeter, College!") == "exeter college"
    assert metrics.exact_match("the Oslo.", ["Lima", "oslo"]) == 1.0
    assert metrics.exact_match("Oslo Lima", ["Oslo"]) == 0.0
    assert metrics.token_f1("Exeter College, Oxford", ["Exeter College"]) == pytest.approx(0.8)
    assert metrics.token_f1("", ["a"]) == 1.0
    assert metrics.token_f1("red red", ["red"]) == pytest.approx(2 / 3)
    assert metrics.rouge_l("the cat sat", ["the dog sat"]) == pytest.approx(2 / 3)


def test_kl_divergence_is_that_of_the_distributions():
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.6, 0.3])
    expected = np.sum(p * np.log(p / q))
    assert metrics.kl_divergence(np.log(q) + 5, np.log(p) - 3) == pytest.approx(expected)
    assert metrics.kl_divergence(np.log(p) + 1, np.log(p)) == pytest.approx(0, abs=1e-12)


def test_the_interval_holds_the_mean_and_narrows_with_more_values():
    values = np.random.default_rng(0).random(400)
    wide, narrow = metrics.bootstrap_interval(values[:20]), metrics.bootstrap_interval(values)
    assert narrow[0] < values.mean() < narrow[1]
    assert narrow[1] - narrow[0] < wide[1] - wide[0]
    assert metrics.bootstrap_interval([1.0]) == (1.0, 1.0)


def test_kv_deviation_counts_only_the_prompts_tokens():
    rng = np.random.default_rng(0)
    k, v, other = (rng.standard_normal((2, 6, 1, 4)).astype(np.float32) for _ in range(3))
    deviation = np.asarray(metrics.kv_deviation_by_layer(KVCache(other, v), KVCache(k, v), 4))
    expected = np.square(other - k)[:, :4].sum((2, 3)) / np.square(k)[:, :4].sum((2, 3)).mean(1, keepdims=True)
    np.testing.assert_allclose(deviation[:, :4], expected, rtol=1e-5)
    assert not deviation[:, 4:].any()


def test_attention_deviation_is_the_distance_of_the_attention_matrices(demo):
    """Against the matrices computed outright, for reuse; and none for the true cache."""
    engine = cb.Engine(demo)
    example = examples("reference", 1, 4, Difficulty((6, 6), (32, 34)))[0]
    prompt = cb.Prompt.to_answer(demo.tokenizer, example.chunks, example.question.text)
    engine.precompute(prompt)
    full, reuse = engine.prefill(prompt, "full"), engine.prefill(prompt, "reuse")
    first = full.token_ids.size - len(prompt.suffix)

    def deviation(out):
        return metrics.attention_deviation_by_layer(demo, full.token_ids, first, out.padded_cache, full.padded_cache)

    np.testing.assert_array_equal(deviation(full), 0.0)
    measured = deviation(reuse)
    assert measured[0] == pytest.approx(0, abs=1e-5)  # keys of layer 0 depend on the token alone
    assert (measured[2:] > 1e-3).all()


def test_insights_on_deviations_made_by_hand():
    deviation = np.zeros((5, 20), np.float32)
    deviation[1] = np.arange(20)[::-1]  # ranks the other way round than the layers above
    deviation[2:] = np.arange(20) ** 3.0
    assert insights.concentration(deviation, 0.15)[2] == pytest.approx(
        (17**3 + 18**3 + 19**3) / (np.arange(20) ** 3).sum()
    )
    assert np.isnan(insights.concentration(deviation)[0])
    np.testing.assert_allclose(insights.neighbour_correlation(deviation)[1:], [-1, 1, 1])
    scores = check_layer.check_layer_scores([deviation, deviation])
    assert scores[1] < 0.01
    assert scores[2] == pytest.approx(1)
    assert check_layer.find_check_layer(scores) == 2


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def rows_of(source, **options):
    return load_rows(source, limit=None, chunk_tokens=4, count_tokens=lambda text: len(text.split()), **options)


def test_the_authors_form_and_longbench_are_read(tmp_path):
    passages = [{"title": "A", "text": "one"}, {"text": "two"}]
    authors = write(tmp_path / "musique.json", [{"question": "q", "answers": ["x", "y"], "ctxs": passages}])
    (row,) = rows_of(authors)
    assert (row.question, row.answers, row.chunks) == ("q", ("x", "y"), ("A\none", "two"))
    line = {"input": "q", "context": "one two three\n\nfour five six", "answers": ["x"], "dataset": "d"}
    longbench = write(tmp_path / "samsum.jsonl", json.dumps(line) + "\n\n" + json.dumps(line | {"input": ""}) + "\n")
    first, second = rows_of(longbench)
    assert first.chunks == ("one two three", "four five six")
    assert first.kind == "d"
    assert second.question  # a summary's
    (broken,) = rows_of(write(tmp_path / "lines.jsonl", LINE.replace('"c"', '"one\u2028two"')))
    assert "one\u2028two" in broken.chunks[0]


GOOD = {"question": "q", "answers": ["x"], "ctxs": [{"text": "t"}]}
LINE = '{"input": "q", "context": "c", "answers": ["x"]}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "a.json is not JSON"),
        ("a.json", [], "a.json holds no rows"),
        ("a.json", [1], "row 0 must be an object, got int"),
        ("a.json", [GOOD, GOOD | {"ctxs": []}], "row 1: field 'ctxs' is empty"),
        ("a.json", [{"question": "q", "ctxs": [{"text": "t"}]}], "row 0: field 'answers' is missing"),
        ("a.json", [GOOD | {"answers": [[]]}], "row 0: field 'answers' is empty"),
        ("a.json", [GOOD | {"answers": "x"}], "field 'answers' must be a list, got str"),
        ("a.json", [GOOD | {"question": 3}], "field 'question' must be text, got int"),
        ("a.json", [GOOD | {"ctxs": [{"title": "t"}]}], "row 0, ctxs 0: field 'text' is missing"),
        ("a.json", [{"question": "q", "answers": ["x"]}], "row 0: field 'context' is missing"),
        ("a.jsonl", LINE + '\n{"inp', "row 1 is not JSON"),
    ],
)
def test_malformed_rows_are_named(tmp_path, name, content, message):
    with pytest.raises(CacheBlendError, match=message):
        rows_of(write(tmp_path / name, content))


def test_curves_are_of_one_setting_each(tmp_path, monkeypatch):
    settings = [Setting("blend", "hkvd", ratio, "kv", stages) for ratio in (0.3, 0.1) for stages in (1, 4)]
    lines = {
        each.label: dict.fromkeys(plots.CURVES, each.ratio) | {"exact_match_interval": (0, 1)} for each in settings
    }
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    plots._quality_curves(tmp_path / "quality.png", settings, lines)
    drawn = figures[0].axes[0].get_lines()
    assert sorted(line.get_label() for line in drawn) == ["hkvd", "hkvd 1 stages"]
    assert all(line.get_xdata().tolist() == [0.1, 0.3] for line in drawn)


def test_a_row_that_does_not_fit_is_named(demo):
    row = Row("rows/7", "", ("a b " * 3000,), "Why?", ("x",))
    with pytest.raises(CacheBlendError, match="row rows/7: the prompt has"):
        Evaluator(demo, [row], max_new_tokens=2)


def test_no_such_data_set():
    with pytest.raises(CacheBlendError, match="neither a file nor 'bundled'"):
        rows_of("nowhere.json")
