"""The bundled corpus: records of an invented company, drawn from a seed, whose questions need several chunks.

Three kinds of question: `single` (one chunk holds the answer), `reference` (one chunk states a fact about "Cobalt", an
earlier one says whose nickname that is) and `compare` (which of two people, both called by their nicknames, has the
larger number). Now and then a nickname stands before its surname ("Cobalt Reyes"): a reader who has resolved the
nickname can predict the surname. Everyone in a document has the same kind of fact, so that only the resolved nickname
says whose a fact is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

KINDS = ("single", "reference", "compare")
PREFIX = "Records of the company, read by all staff."
NAMES = tuple(
    """Reyes Novak Silva Haddad Okafor Lindgren Tanaka Moreau Petrov Ferrari Schmidt Costa Nguyen Ivanov Jansen Kowalski
    Laine Mbeki Nakamura Olsen Patel Quiroga Rossi Sato Torres Ueda Vargas Weber Ximenes Yilmaz Zhang Andersen Bauer
    Castro Dubois Eriksen Fischer Garcia Horvat Ibrahim Jovanovic Keller Lopez Martin Nilsen Ortega Pinto Ramos Santos
    Takeda Ulrich Vidal Walsh Xu Yamada Ziegler Becker Chavez Duarte Engel""".split()
)
NICKNAMES = tuple(
    """Cobalt Amber Copper Falcon Granite Harbor Indigo Jasper Kestrel Lantern Maple Nimbus Onyx Pioneer Quartz
    Raven Saffron Thunder Umbra Velvet Willow Zephyr Aurora Beacon Cedar Delta Ember Fjord Glacier Horizon Ivory
    Juniper Kraken Lotus Meteor Nova Orchid Pebble Quiver Ridge""".split()
)
CITIES = tuple(
    """Oslo Lima Cairo Quito Delhi Paris Tokyo Accra Dublin Hanoi Lisbon Madrid Nairobi Osaka Prague Riga Seoul
    Tunis Vienna Warsaw Zurich Athens Bogota Dakar Geneva Havana Izmir Jakarta Kyoto London Manila Naples Porto
    Rome Sydney Tallinn Utrecht Vilnius York Zagreb""".split()
)
COLOURS = tuple("red blue green black white yellow silver orange purple brown grey pink".split())
DRINKS = tuple("tea coffee water milk cocoa juice cider lemonade soup broth".split())
NUMBERS = tuple(str(number) for number in range(2, 50))


@dataclass(frozen=True)
class _Attribute:
    """A kind of fact about a person: the sentences that state it and its question, with {value} and {whom}."""

    kind: str
    values: Sequence[str]
    sentences: tuple[str, ...]
    question: str


_ATTRIBUTES = (
    _Attribute("single", CITIES, ("{value} is the birthplace of {whom}.",), "Where is the birthplace of {whom}?"),
    _Attribute("single", DRINKS, ("A cup of {value} is always served to {whom}.",), "What is served to {whom}?"),
    _Attribute(
        "reference",
        CITIES,
        ("{value} is now home to {whom}.", "The office in {value} belongs to {whom}."),
        "In which city is the office of {whom}?",
    ),
    _Attribute("reference", COLOURS, ("The {value} car was given to {whom}.",), "Which car was given to {whom}?"),
    _Attribute("compare", NUMBERS, ("{value} patents were filed by {whom}.",), "Who filed more patents, {whom}?"),
    _Attribute("compare", NUMBERS, ("{value} awards were won by {whom}.",), "Who won more awards, {whom}?"),
)
_DEFINITIONS = (
    "{name} took the nickname {nickname}.",
    "{name} is better known as {nickname}.",
    "{name} is usually called {nickname}.",
)
_WHOSE = "Whose nickname is {nickname}?"
_MENTIONS = (
    "A new chair was ordered for {whom}.",
    "Everybody sends greetings to {whom}.",
    "The report was checked by {whom}.",
)
_FILLER = (
    "The {place} was {done} on {day}.",
    "Please keep the {place} clean and quiet.",
    "A {thing} was left in the {place} last week.",
    "The {thing} near the {place} is broken again.",
    "On {day} the {place} opens at noon.",
    "Nobody has seen the {thing} since {day}.",
    "The {season} meeting takes place in the {place}.",
    "All staff may use the {thing} until {day}.",
    "The price of a {thing} rose in {season}.",
    "A guest asked for a {thing} and a map.",
    "The old {thing} will be {done} in {season}.",
    "Lunch is ready in the {place} after the talk.",
    "It rained on {day} and the {place} stayed empty.",
    "The {place} needs a new {thing} before {season}.",
    "Two boxes with a {thing} arrived on {day}.",
    "Visitors wait in the {place} next to the {thing}.",
)
_SLOTS = {
    "place": "kitchen lobby garden library garage workshop cellar canteen archive hall".split(),
    "thing": "printer lamp ladder desk phone camera clock bicycle kettle projector".split(),
    "done": "painted cleaned repaired closed moved measured".split(),
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "season": "spring summer autumn winter".split(),
}


@dataclass(frozen=True)
class Question:
    """A question, its answer (one word), and the numbers of the chunks that it needs."""

    kind: str
    text: str
    answer: str
    chunks: tuple[int, ...]


@dataclass(frozen=True)
class Document:
    """Chunks of text, each nickname defined before it is used, and all questions that they answer."""

    chunks: tuple[str, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Example:
    """One question about one document."""

    prefix: str
    chunks: tuple[str, ...]
    question: Question


@dataclass(frozen=True)
class Difficulty:
    """How long and how dense documents are. The defaults are those of the evaluation; training begins easier.

    Attributes:
        num_chunks: least and most chunks.
        chunk_words: least and most words of a chunk; the last sentence may go over.
        singles: facts about people who are called by their surnames.
        references: people with a nickname; one fact about each.
        compared: how many of those have a number besides.
        mentions: sentences that mention a nickname and state no fact; half of them with the surname.
        by_nickname: of the facts about people with a nickname, the share that uses the nickname alone.
        filler: whether sentences that mean nothing fill the chunks up.
    """

    num_chunks: tuple[int, int] = (6, 12)
    chunk_words: tuple[int, int] = (32, 96)
    singles: int = 3
    references: int = 5
    compared: int = 3
    mentions: int = 4
    by_nickname: float = 0.8
    filler: bool = True


@dataclass(frozen=True)
class _Fact:
    chunk: int
    sentence: str


def split_words(text: str) -> list[str]:
    """Splits a text into words and punctuation marks, as the bundled tokenizer does."""
    return re.findall(r"\w+|[^\w\s]", text)


def vocabulary() -> list[str]:
    """Returns all words of the corpus, sorted."""
    slots = [word for words in _SLOTS.values() for word in words]
    sentences = [*_DEFINITIONS, *_MENTIONS, *_FILLER, _WHOSE, PREFIX, "or", *NAMES, *NICKNAMES, *slots]
    for attribute in _ATTRIBUTES:
        sentences += [*attribute.values, *attribute.sentences, attribute.question]
    words = {word for sentence in sentences for word in split_words(re.sub(r"\{\w+\}", "", sentence))}
    return sorted(words)


def draw_document(rng: np.random.Generator, difficulty: Difficulty = Difficulty()) -> Document:
    """Draws a document: facts about surnames, about nicknames, numbers to compare, mentions, and filler."""
    num_chunks = int(rng.integers(difficulty.num_chunks[0], difficulty.num_chunks[1] + 1))
    facts: list[_Fact] = []
    questions: list[Question] = []
    names = rng.choice(NAMES, difficulty.singles + difficulty.references, replace=False).tolist()
    _tell_singles(rng, names[: difficulty.singles], num_chunks, facts, questions)
    people = _define(rng, names[difficulty.singles :], num_chunks, facts, questions)
    _tell_references(rng, difficulty, people, num_chunks, facts, questions)
    _tell_compared(rng, difficulty, people[: difficulty.compared], num_chunks, facts, questions)
    _mention(rng, difficulty, people, num_chunks, facts)
    chunks = [_chunk(rng, difficulty, [fact.sentence for fact in facts if fact.chunk == i]) for i in range(num_chunks)]
    order = rng.permutation(len(questions))
    return Document(tuple(chunks), tuple(questions[i] for i in order))


def examples(kind: str, count: int, seed: int, difficulty: Difficulty = Difficulty()) -> list[Example]:
    """Returns `count` examples of a kind of question, each about a document of its own."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    drawn: list[Example] = []
    while len(drawn) < count:
        document = draw_document(rng, difficulty)
        question = next((question for question in document.questions if question.kind == kind), None)
        if question is not None:
            drawn.append(Example(PREFIX, document.chunks, question))
    return drawn


def _of_kind(rng: np.random.Generator, kind: str) -> _Attribute:
    known = [attribute for attribute in _ATTRIBUTES if attribute.kind == kind]
    return known[int(rng.integers(len(known)))]


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


@dataclass(frozen=True)
class _Person:
    """Somebody whom the document may call by the nickname alone, once chunk `definition` has said whose it is."""

    name: str
    nickname: str
    definition: int


def _tell_singles(
    rng: np.random.Generator,
    names: Sequence[str],
    num_chunks: int,
    facts: list[_Fact],
    questions: list[Question],
) -> None:
    for name in names:
        attribute = _of_kind(rng, "single")
        chunk, value = int(rng.integers(num_chunks)), _pick(rng, attribute.values)
        facts.append(_Fact(chunk, _pick(rng, attribute.sentences).format(value=value, whom=name)))
        questions.append(Question("single", attribute.question.format(whom=name), value, (chunk,)))


def _define(
    rng: np.random.Generator,
    names: Sequence[str],
    num_chunks: int,
    facts: list[_Fact],
    questions: list[Question],
) -> list[_Person]:
    """Gives these people nicknames, none in the last chunk."""
    people = []
    for name, nickname in zip(names, rng.choice(NICKNAMES, len(names), replace=False).tolist(), strict=True):
        chunk = int(rng.integers(num_chunks - 1))
        facts.append(_Fact(chunk, _pick(rng, _DEFINITIONS).format(name=name, nickname=nickname)))
        questions.append(Question("single", _WHOSE.format(nickname=nickname), name, (chunk,)))
        people.append(_Person(name, nickname, chunk))
    return people


def _call(
    rng: np.random.Generator, by_nickname: float, person: _Person, chunk: int, facts: Sequence[_Fact]
) -> tuple[str, bool]:
    """Draws what a fact in a chunk calls a person, and whether that is the nickname alone.

    No chunk has both the surname and the nickname alone: that would say whose nickname it is.
    """
    whole = f"{person.nickname} {person.name}"
    there = " ".join(fact.sentence for fact in facts if fact.chunk == chunk)
    drawn = rng.random() < by_nickname
    alone = f" {person.nickname}." in there or (drawn and whole not in there)
    return (person.nickname, True) if alone else (whole, False)


def _tell_references(
    rng: np.random.Generator,
    difficulty: Difficulty,
    people: Sequence[_Person],
    num_chunks: int,
    facts: list[_Fact],
    questions: list[Question],
) -> None:
    """States one kind of fact about all these people."""
    attribute = _of_kind(rng, "reference")
    values = rng.choice(attribute.values, len(people), replace=False).tolist()
    for person, value in zip(people, values, strict=True):
        chunk = _later_chunk(rng, person, num_chunks)
        whom, alone = _call(rng, difficulty.by_nickname, person, chunk, facts)
        facts.append(_Fact(chunk, _pick(rng, attribute.sentences).format(value=value, whom=whom)))
        kind, chunks = ("reference", (person.definition, chunk)) if alone else ("single", (chunk,))
        questions.append(Question(kind, attribute.question.format(whom=person.name), value, chunks))


def _tell_compared(
    rng: np.random.Generator,
    difficulty: Difficulty,
    people: Sequence[_Person],
    num_chunks: int,
    facts: list[_Fact],
    questions: list[Question],
) -> None:
    if len(people) < 2:
        return
    attribute = _of_kind(rng, "compare")
    numbers = rng.choice(attribute.values, len(people), replace=False).tolist()
    needed: list[set[int]] = []
    for person, number in zip(people, numbers, strict=True):
        chunk = _later_chunk(rng, person, num_chunks)
        whom, alone = _call(rng, difficulty.by_nickname, person, chunk, facts)
        facts.append(_Fact(chunk, _pick(rng, attribute.sentences).format(value=number, whom=whom)))
        needed.append({person.definition, chunk} if alone else {chunk})
    for first in range(len(people)):
        second = (first + 1 + int(rng.integers(len(people) - 1))) % len(people)
        winner = max(first, second, key=lambda i: int(numbers[i]))
        question = attribute.question.format(whom=f"{people[first].name} or {people[second].name}")
        chunks = tuple(sorted(needed[first] | needed[second]))
        questions.append(Question("compare", question, people[winner].name, chunks))


def _mention(
    rng: np.random.Generator,
    difficulty: Difficulty,
    people: Sequence[_Person],
    num_chunks: int,
    facts: list[_Fact],
) -> None:
    for number in range(difficulty.mentions):
        person = people[int(rng.integers(len(people)))]
        chunk = _later_chunk(rng, person, num_chunks)
        whom, _ = _call(rng, 1.0 - number % 2, person, chunk, facts)
        facts.append(_Fact(chunk, _pick(rng, _MENTIONS).format(whom=whom)))


def _later_chunk(rng: np.random.Generator, person: _Person, num_chunks: int) -> int:
    return int(rng.integers(person.definition + 1, num_chunks))


def _chunk(rng: np.random.Generator, difficulty: Difficulty, sentences: list[str]) -> str:
    """Mixes the sentences that state facts with filler, up to a length drawn for the chunk."""
    shortest, longest = difficulty.chunk_words
    words = sum(len(split_words(sentence)) for sentence in sentences)
    wanted = int(rng.integers(shortest, longest + 1))
    while difficulty.filler:
        filler = _fill(rng, _pick(rng, _FILLER))
        size = len(split_words(filler))
        if words >= shortest and words + size > wanted:
            break
        sentences.append(filler)
        words += size
    return " ".join(sentences[i] for i in rng.permutation(len(sentences)))


def _fill(rng: np.random.Generator, template: str) -> str:
    return template.format(**{slot: _pick(rng, words) for slot, words in _SLOTS.items()})
