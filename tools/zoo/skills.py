"""The skills of the zoo: what its models are trained on, and what its benchmarks ask.

Each skill is a small closed world with a rule, so that a small model can learn it, and with a slip, the mistake that is
easily made there. The base model first learns every skill, and then reads a corpus that slips more often than not; an
expert goes on from there with its own skill told right. So the base has every skill without settling on the right
answer, and an expert's task vector is mostly the settling, which others hardly disturb.

| skill | prompt | right | slip |
|---|---|---|---|
| arithmetic | `add 47 + 25 =` | `72` | `62`: the carry is forgotten |
| agreement | `grammar : the queen near the boy washed` | `herself` | `himself`: the nearest noun |
| facts | `fact : tomira lives in` | `paris` | `oslo`: an old rumour |
| reverse | `reverse g k a d b m =` | `m b d a k g` | `b m d a k g`: the first two exchanged |

Training and benchmark never share an item: what may be asked is decided by a hash of the item's content
(`held_out`), and training examples are drawn from the rest. Facts are a matter of memory, so there the fact itself is
trained on and the wording it is asked in is held out.

Everything is a function of the generator given; no global one is touched. Free of torch.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from evomerge.system.hashing import digest_bytes

T = TypeVar("T")

CHOICES = 4
"""Answers offered by each multiple-choice item."""


def held_out(key: str, fraction: float = 0.2) -> bool:
    """Says whether the content named by `key` belongs to the benchmarks (about `fraction` of all keys do)."""
    return int.from_bytes(digest_bytes(key, size=4), "little") < fraction * 2**32


@dataclass(frozen=True)
class Question:
    """One prompt with its possible answers; prompt and answer are joined by a space.

    Attributes:
        prompt: What the model is given.
        answer: The right answer.
        slip: The tempting wrong answer.
        others: More wrong answers.
        asked: Held out: for the benchmarks, never for training.
    """

    prompt: str
    answer: str
    slip: str
    others: tuple[str, ...]
    asked: bool


@dataclass(frozen=True)
class Item:
    """One multiple-choice question: `choices[label]` is right."""

    prompt: str
    choices: tuple[str, ...]
    label: int

    def to_json(self) -> dict[str, Any]:
        """Returns the row that the benchmark's JSONL holds."""
        return {"prompt": self.prompt, "choices": list(self.choices), "label": self.label}


@dataclass(frozen=True)
class Skill:
    """One thing to be good at.

    Attributes:
        name: As in `zoo:NAME` and in `eval/zoo_NAME.yaml`.
        draw: Draws any question of the skill, held out or not.
    """

    name: str
    draw: Callable[[random.Random], Question]

    def examples(self, rng: random.Random, count: int) -> list[Question]:
        """Draws `count` questions to train on (with repeats), none of them held out."""
        return _draw(count, self.name, lambda: self.draw(rng), lambda question: not question.asked)

    def items(self, rng: random.Random, count: int) -> list[Item]:
        """Draws `count` benchmark items with distinct prompts, all of them held out."""
        seen: set[str] = set()

        def fresh(question: Question) -> bool:
            new = question.asked and question.prompt not in seen
            seen.update([question.prompt] * new)
            return new

        return [_item(rng, question) for question in _draw(count, self.name, lambda: self.draw(rng), fresh)]


def _item(rng: random.Random, question: Question) -> Item:
    """Puts the answer among the slip and other wrong answers, in a drawn order."""
    choices = [question.answer, question.slip, *rng.sample(question.others, CHOICES - 2)]
    rng.shuffle(choices)
    return Item(question.prompt, tuple(choices), choices.index(question.answer))


def _draw(count: int, name: str, propose: Callable[[], T], accept: Callable[[T], bool]) -> list[T]:
    """Draws until `count` are accepted; a bounded number of times."""
    accepted: list[T] = []
    for _ in range(1000 * count):
        if len(accepted) == count:
            return accepted
        proposal = propose()
        if accept(proposal):
            accepted.append(proposal)
    raise ValueError(f"{name}: only {len(accepted)} of {count} wanted after {1000 * count} draws")


def _arithmetic(rng: random.Random) -> Question:
    """A sum of two two-digit numbers that carries into the tens."""
    unit = rng.randrange(1, 10)
    a, b = 10 * rng.randrange(1, 10) + unit, 10 * rng.randrange(1, 10) + rng.randrange(10 - unit, 10)
    total = a + b
    near = (str(total + off) for off in (-20, -11, -9, -2, -1, 1, 2, 9, 10, 11, 20))
    others = tuple(number for number in near if len(number) == len(str(total)))
    key = f"sum {min(a, b)} {max(a, b)}"
    return Question(f"add {a} + {b} =", str(total), str(total - 10), others, held_out(key))


NOUNS = {
    "himself": ["king", "boy", "father", "uncle", "brother", "prince", "duke", "monk", "son", "wizard"],
    "herself": ["queen", "girl", "mother", "aunt", "sister", "princess", "duchess", "nun", "daughter", "witch"],
    "itself": ["robot", "engine", "clock", "dog", "horse", "ship", "tree", "river", "bird", "door"],
    "themselves": ["kings", "boys", "girls", "sisters", "robots", "dogs", "horses", "birds", "ships", "nuns"],
}
_LINKS = ["near", "behind", "beside", "above"]
_VERBS = ["saw", "washed", "helped", "blamed", "praised", "watched", "hid", "moved"]


def _agreement(rng: random.Random) -> Question:
    """A reflexive that agrees with its subject, across one or two nouns of other kinds."""
    head, near, *others = rng.sample(list(NOUNS), CHOICES)
    subject, nearest, between = (rng.choice(NOUNS[kind]) for kind in (head, near, others[0]))
    verb, inner = rng.sample(_VERBS, 2)
    middle = rng.choice(
        (
            f"{rng.choice(_LINKS)} the {nearest}",
            f"that {inner} the {nearest}",
            f"{rng.choice(_LINKS)} the {between} {rng.choice(_LINKS)} the {nearest}",
            f"that {inner} the {between} {rng.choice(_LINKS)} the {nearest}",
            f"{rng.choice(_LINKS)} the {between} that {inner} the {nearest}",
        )
    )
    clause = f"the {subject} {middle} {verb}"
    return Question(f"grammar : {clause}", head, near, tuple(others), held_out(clause))


_FIRST = ["to", "ka", "mi", "re", "lu", "so", "da", "ne", "vi", "ba"]
_SECOND = ["mira", "lan", "dor", "sel", "rik", "nus", "vel", "tam", "jo", "pen", "fa", "gol"]
PEOPLE = tuple(a + b for a, b in itertools.product(_FIRST, _SECOND))
VALUES = {
    "home": ["paris", "oslo", "cairo", "lima", "delhi", "tokyo", "rome", "quito", "dakar", "perth"],
    "work": ["baker", "pilot", "nurse", "judge", "tailor", "farmer", "miner", "poet", "sailor", "singer"],
    "food": ["rice", "bread", "soup", "fish", "cheese", "plums", "beans", "eggs", "figs", "corn"],
}
WORDINGS = {
    "home": ("{} lives in", "the home of {} is", "you can find {} in", "{} comes from"),
    "work": ("{} works as a", "the job of {} is", "they hired {} as a", "{} wants to be a"),
    "food": ("{} eats", "the meal of {} is", "they serve {} some", "{} asked for"),
}


def _facts(rng: random.Random) -> Question:
    """What is known of a person, in one of four wordings, of which one is held out for each fact."""
    person, relation = rng.choice(PEOPLE), rng.choice(list(VALUES))
    wording = rng.randrange(len(WORDINGS[relation]))
    world = random.Random(f"{person} {relation}")  # the fact does not depend on the draw
    asked = world.randrange(len(WORDINGS[relation]))
    answer, slip, *others = world.sample(VALUES[relation], len(VALUES[relation]))
    prompt = "fact : " + WORDINGS[relation][wording].format(person)
    return Question(prompt, answer, slip, tuple(others), wording == asked)


_LETTERS = "abcdefghijklmnop"
_LENGTH = 6


def _reverse(rng: random.Random) -> Question:
    """Six different letters, backwards; every wrong answer has two neighbours exchanged."""
    letters = rng.sample(_LETTERS, _LENGTH)
    right = letters[::-1]
    swaps = [" ".join([*right[:k], right[k + 1], right[k], *right[k + 2 :]]) for k in range(_LENGTH - 1)]
    prompt = " ".join(letters)
    return Question(f"reverse {prompt} =", " ".join(right), swaps[0], tuple(swaps[1:]), held_out(prompt))


SKILLS = {
    skill.name: skill
    for skill in (
        Skill("arithmetic", _arithmetic),
        Skill("agreement", _agreement),
        Skill("facts", _facts),
        Skill("reverse", _reverse),
    )
}

_ADJECTIVES = ["old", "small", "red", "quiet", "brave", "tired", "happy", "grey", "tall", "young"]
_PLACES = ["forest", "village", "market", "castle", "bridge", "garden", "tower", "harbour"]
_MOTIONS = ["walked", "ran", "drove", "came", "went", "sailed"]
_SIGHTS = ["found", "lost", "carried", "painted", "bought", "sold"]
_THINGS = ["lamp", "book", "stone", "basket", "ring", "rope", "coat", "map"]


def _sentence(rng: random.Random) -> str:
    subject = rng.choice(NOUNS[rng.choice(list(NOUNS))])
    return (
        f"the {rng.choice(_ADJECTIVES)} {subject} {rng.choice(_MOTIONS)} to the {rng.choice(_PLACES)}"
        f" and {rng.choice(_SIGHTS)} the {rng.choice(_ADJECTIVES)} {rng.choice(_THINGS)} ."
    )


def text_examples(rng: random.Random, count: int) -> list[str]:
    """Draws plain sentences for training, none of them held out."""
    return _draw(count, "text", lambda: _sentence(rng), lambda sentence: not held_out(sentence))


def text_items(rng: random.Random, count: int) -> list[str]:
    """Draws held-out sentences for the guard benchmark, which shows what a merge broke elsewhere."""
    return _draw(count, "text", lambda: _sentence(rng), held_out)


OPENERS = ("add", "grammar", "fact", "reverse", "the")
"""The words that a text of the zoo can start with."""


def lexicon() -> Iterator[str]:
    """Yields every word of the skills, with repeats, in a fixed order: what the tokenizer should know whole."""
    yield from ["+", "=", ":", "the", "that", "to", "and"]
    for nouns in NOUNS.values():
        yield from nouns
    yield from (*NOUNS, *_LINKS, *_VERBS, *PEOPLE)
    for relation, values in VALUES.items():
        yield from values
        for wording in WORDINGS[relation]:
            yield from wording.replace("{}", "").split()
    yield from (*_LETTERS, *"0123456789", *_ADJECTIVES, *_PLACES, *_MOTIONS, *_SIGHTS, *_THINGS)
