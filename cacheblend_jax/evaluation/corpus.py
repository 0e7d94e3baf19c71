"""The bundled corpus: records of an invented company, made from a seed, whose answers need attention between chunks.

Three kinds of question: `single` (one chunk holds the answer), `reference` (a chunk tells something of "the Cobalt
chemist", and an earlier one who that is) and `compare` (of which of two people a larger number is told).
In "the Cobalt chemist" the profession agrees with the person, as gender does in many languages: a reader who resolves
the reference can tell the word before reading it.

A document's people mostly have professions of their own, which tells who is meant without the earlier chunk; with
`Difficulty(references=6, professions=2, compared_by_name=False)` they share two, as they would a gender.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

KINDS = ("single", "reference", "compare")
PREFIX = "Records of the company, read by all staff."
_PEOPLE = {
    "chemist": "Ana Bruno Celine Dmitri Elif",
    "lawyer": "Farid Greta Hassan Ines Jonas",
    "engineer": "Keiko Lars Mira Noel Olga",
    "nurse": "Pedro Quinn Rosa Samir Tara",
    "driver": "Ugo Vera Walid Xenia Yusuf",
    "painter": "Zoe Arne Bella Carlos Dana",
    "baker": "Emil Fiona Gustav Hana Ivan",
    "pilot": "Jade Karim Lena Marco Nadia",
    "editor": "Oscar Priya Ravi Sofia Tomas",
    "farmer": "Uma Viktor Wanda Ximena Yara",
    "welder": "Zeno Alma Boris Clara Diego",
    "tailor": "Eva Felix Gina Hugo Iris",
}
PROFESSION_OF = {name: profession for profession, names in _PEOPLE.items() for name in names.split()}
NAMES = tuple(PROFESSION_OF)
PROFESSIONS = tuple(_PEOPLE)
TEAMS = tuple(
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
    """A thing told of a person: its sentences and its question, with {value} and {whom}."""

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
_DEFINITIONS = ("{name} joined the {team} team.", "{name} leads the {team} team.", "{name} runs the {team} team.")
_WHOSE = "Whose team is {team}?"
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
    """A question, its answer (one word), and the chunks that it needs."""

    kind: str
    text: str
    answer: str
    chunks: tuple[int, ...]


@dataclass(frozen=True)
class Document:
    """Chunks of text in an order that keeps a definition before its use, and all questions that they answer."""

    chunks: tuple[str, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Example:
    """One question to ask of one document."""

    prefix: str
    chunks: tuple[str, ...]
    question: Question


@dataclass(frozen=True)
class Difficulty:
    """How long and how dense documents are. The defaults are what the evaluation asks; training begins easier.

    Attributes:
        professions: how many the people referred to share; 0: each has their own, mostly.
        compared_by_name: numbers are told of people by their names, not of "the Cobalt chemist".
    """

    num_chunks: tuple[int, int] = (6, 12)
    chunk_words: tuple[int, int] = (32, 96)
    singles: int = 3
    references: int = 4
    compared: int = 3
    mentions: int = 2
    filler: bool = True
    professions: int = 0
    compared_by_name: bool = True


@dataclass(frozen=True)
class _Fact:
    chunk: int
    sentence: str


def split_words(text: str) -> list[str]:
    """Words and punctuation marks, as the bundled tokenizer splits them."""
    return re.findall(r"\w+|[^\w\s]", text)


def vocabulary() -> list[str]:
    """All words of the corpus, sorted."""
    slots = [word for words in _SLOTS.values() for word in words]
    sentences = [*_DEFINITIONS, *_MENTIONS, *_FILLER, _WHOSE, PREFIX, "the or", *NAMES, *PROFESSIONS, *TEAMS, *slots]
    for attribute in _ATTRIBUTES:
        sentences += [*attribute.values, *attribute.sentences, attribute.question]
    words = {word for sentence in sentences for word in split_words(re.sub(r"\{\w+\}", "", sentence))}
    return sorted(words)


def draw_document(rng: np.random.Generator, difficulty: Difficulty = Difficulty()) -> Document:
    """Draws a document: people with facts of their own, references to people of a team, numbers, and filler."""
    num_chunks = int(rng.integers(difficulty.num_chunks[0], difficulty.num_chunks[1] + 1))
    facts: list[_Fact] = []
    questions: list[Question] = []
    _tell_singles(rng, difficulty.singles, num_chunks, facts, questions)
    people = _tell_references(rng, difficulty, num_chunks, facts, questions)
    if difficulty.compared_by_name:
        people = [_Person(name, name, -1) for name in _draw_people(rng, difficulty.compared, 0)]
    _tell_compared(rng, people[: difficulty.compared], num_chunks, facts, questions)
    chunks = [_chunk(rng, difficulty, [fact.sentence for fact in facts if fact.chunk == i]) for i in range(num_chunks)]
    order = rng.permutation(len(questions))
    return Document(tuple(chunks), tuple(questions[i] for i in order))


def examples(kind: str, count: int, seed: int, difficulty: Difficulty = Difficulty()) -> list[Example]:
    """Returns `count` examples of a kind, each of a document of its own."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    drawn: list[Example] = []
    while len(drawn) < count:
        document = draw_document(rng, difficulty)
        question = next(question for question in document.questions if question.kind == kind)
        drawn.append(Example(PREFIX, document.chunks, question))
    return drawn


def _of_kind(rng: np.random.Generator, kind: str) -> _Attribute:
    known = [attribute for attribute in _ATTRIBUTES if attribute.kind == kind]
    return known[int(rng.integers(len(known)))]


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _tell_singles(rng, count: int, num_chunks: int, facts: list[_Fact], questions: list[Question]) -> None:
    for name in rng.choice(NAMES, count, replace=False):
        attribute = _of_kind(rng, "single")
        chunk, value = int(rng.integers(num_chunks)), _pick(rng, attribute.values)
        facts.append(_Fact(chunk, _pick(rng, attribute.sentences).format(value=value, whom=name)))
        questions.append(Question("single", attribute.question.format(whom=name), value, (chunk,)))


@dataclass(frozen=True)
class _Person:
    """Somebody whom the document calls by team and profession only, after the chunk that tells the name."""

    name: str
    whom: str
    definition: int


def _draw_people(rng: np.random.Generator, count: int, num_professions: int) -> list[str]:
    """Draws names, as many of each profession: then a profession alone tells nobody apart, as gender does not."""
    if not num_professions:
        return [str(name) for name in rng.choice(NAMES, count, replace=False)]
    professions = rng.choice(PROFESSIONS, num_professions, replace=False)
    sizes = [len(part) for part in np.array_split(np.arange(count), num_professions)]
    groups = zip(professions, sizes, strict=True)
    return [str(name) for profession, size in groups for name in rng.choice(_PEOPLE[profession].split(), size, False)]


def _tell_references(
    rng, difficulty: Difficulty, num_chunks: int, facts: list[_Fact], questions: list[Question]
) -> list[_Person]:
    if not difficulty.references:
        return []
    names = _draw_people(rng, difficulty.references, difficulty.professions)
    teams = rng.choice(TEAMS, difficulty.references, replace=False)
    people = []
    for name, team in zip(names, teams, strict=True):
        attribute = _of_kind(rng, "reference")
        definition, use = sorted(rng.choice(num_chunks, 2, replace=False).tolist())
        whom = f"the {team} {PROFESSION_OF[name]}"
        value = _pick(rng, attribute.values)
        facts.append(_Fact(definition, _pick(rng, _DEFINITIONS).format(name=name, team=team)))
        facts.append(_Fact(use, _pick(rng, attribute.sentences).format(value=value, whom=whom)))
        questions.append(Question("reference", attribute.question.format(whom=name), value, (definition, use)))
        questions.append(Question("single", _WHOSE.format(team=team), name, (definition,)))
        people.append(_Person(name, whom, definition))
    for _ in range(difficulty.mentions):
        person = people[rng.integers(len(people))]
        facts.append(_Fact(_later_chunk(rng, person, num_chunks), _pick(rng, _MENTIONS).format(whom=person.whom)))
    return people


def _later_chunk(rng: np.random.Generator, person: _Person, num_chunks: int) -> int:
    return int(rng.integers(person.definition + 1, num_chunks))


def _tell_compared(rng, people: Sequence[_Person], num_chunks: int, facts: list[_Fact], questions: list[Question]):
    """Tells a number of each of these people, who are of one profession as far as there are enough of it."""
    if len(people) < 2:
        return
    attribute = _of_kind(rng, "compare")
    numbers = rng.choice(attribute.values, len(people), replace=False)
    chunks = [_later_chunk(rng, person, num_chunks) for person in people]
    for person, number, chunk in zip(people, numbers, chunks, strict=True):
        facts.append(_Fact(chunk, _pick(rng, attribute.sentences).format(value=number, whom=person.whom)))
    for first in range(len(people)):
        second = (first + 1 + int(rng.integers(len(people) - 1))) % len(people)
        winner = max(first, second, key=lambda i: int(numbers[i]))
        question = attribute.question.format(whom=f"{people[first].name} or {people[second].name}")
        needed = sorted({place for i in (first, second) for place in (people[i].definition, chunks[i]) if place >= 0})
        questions.append(Question("compare", question, people[winner].name, tuple(needed)))


def _chunk(rng: np.random.Generator, difficulty: Difficulty, sentences: list[str]) -> str:
    """Mixes a chunk's meaningful sentences with filler, up to a length drawn for it."""
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
