"""The embedded instruction data: small questions about lists of words, each with one right answer.

A task is drawn as (instruction, items of the right answer, how the items become a sentence). The same draw can be
answered *carefully* (the right items) or *carelessly* (items swapped, dropped, doubled or replaced, or a refusal).
The base model is pretrained on both, so it knows how to answer well but mostly does not: the setting in which the
paper starts from a pretrained model, in miniature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

KINDS = {
    "animals": "bear cat dog fox goat hen lion mouse".split(),
    "fruits": "apple banana cherry fig grape lemon melon pear".split(),
    "colours": "black blue brown green grey red white yellow".split(),
    "tools": "axe drill file hammer knife ladder saw spade".split(),
    "clothes": "belt boot cap coat dress hat scarf shirt".split(),
}
WORDS = sorted(word for words in KINDS.values() for word in words)
KIND_OF = {word: kind for kind, words in KINDS.items() for word in words}
NUMBERS = "zero one two three four five".split()


@dataclass(frozen=True)
class Task:
    """One drawn question: `answer(items)` is its right answer, `distractors` are words a careless writer may slip in."""

    instruction: str
    items: tuple[str, ...]
    distractors: tuple[str, ...]
    sentence: Callable[[list[str]], str]

    @property
    def careful(self) -> str:
        return self.sentence(list(self.items))


def _listing(items: list[str]) -> str:
    return (", ".join(items) if items else "none") + "."


def _first_last(items: list[str]) -> str:
    return f"The first is {items[0]} and the last is {items[-1]}."


def _sort(rng: Random) -> Task:
    words = rng.sample(WORDS, rng.randint(3, 5))
    ask = rng.choice(["Sort these words from A to Z", "Put these words in alphabetical order", "Sort this list by letter"])
    return Task(f"{ask}: {', '.join(words)}.", tuple(sorted(words)), tuple(words), _listing)


def _reverse(rng: Random) -> Task:
    words = rng.sample(WORDS, rng.randint(3, 5))
    ask = rng.choice(["Write this list backwards", "Reverse the order of these words", "Read this list from the end"])
    return Task(f"{ask}: {', '.join(words)}.", tuple(reversed(words)), tuple(words), _listing)


def _ends(rng: Random) -> Task:
    words = rng.sample(WORDS, rng.randint(3, 5))
    ask = rng.choice(["What are the first and the last word of this list", "Name the first and the last word"])
    return Task(f"{ask}: {', '.join(words)}?", (words[0], words[-1]), tuple(words), _first_last)


def _which(rng: Random) -> Task:
    kind = rng.choice(list(KINDS))
    inside = rng.sample(KINDS[kind], rng.randint(1, 3))
    outside = rng.sample([word for word in WORDS if KIND_OF[word] != kind], rng.randint(1, 3))
    words = rng.sample(inside + outside, len(inside) + len(outside))
    ask = rng.choice([f"Which of these are {kind}", f"Pick the {kind} from this list"])
    chosen = tuple(word for word in words if KIND_OF[word] == kind)
    return Task(f"{ask}: {', '.join(words)}?", chosen, tuple(words), _listing)


def _remove(rng: Random) -> Task:
    words = rng.sample(WORDS, rng.randint(4, 5))
    gone = rng.choice(words)
    ask = rng.choice([f"Remove {gone} from this list", f"Leave out {gone} and repeat the rest"])
    return Task(f"{ask}: {', '.join(words)}.", tuple(w for w in words if w != gone), tuple(words), _listing)


def _replace(rng: Random) -> Task:
    words = rng.sample(WORDS, rng.randint(3, 5))
    old, new = rng.choice(words), rng.choice([word for word in WORDS if word not in words])
    ask = rng.choice([f"Replace {old} by {new} in this list", f"Repeat this list with {new} instead of {old}"])
    return Task(f"{ask}: {', '.join(words)}.", tuple(new if w == old else w for w in words), tuple(words), _listing)


def _count(rng: Random) -> Task:
    kind = rng.choice(list(KINDS))
    inside = rng.sample(KINDS[kind], rng.randint(0, 3))
    outside = rng.sample([word for word in WORDS if KIND_OF[word] != kind], rng.randint(1, 2))
    words = rng.sample(inside + outside, len(inside) + len(outside))
    ask = rng.choice([f"How many {kind} are in this list", f"Count the {kind}"])
    return Task(f"{ask}: {', '.join(words)}?", (NUMBERS[len(inside)],), tuple(NUMBERS), lambda items: f"There are {items[0]}.")


_DRAWS = (_sort, _reverse, _ends, _which, _remove, _replace, _count)


def draw_task(rng: Random) -> Task:
    """Draw one task, each kind equally likely."""
    return rng.choice(_DRAWS)(rng)


def careless_answer(task: Task, rng: Random) -> str:
    """Answer `task` wrongly in one of the ways a careless writer would; never returns the careful answer."""
    if rng.random() < 0.15:
        return "I do not know."
    while True:
        items = list(task.items)
        how = rng.choice(["swap", "drop", "double", "replace"])
        place = rng.randrange(len(items))
        if how == "swap" and len(items) > 1:
            other = rng.choice([i for i in range(len(items)) if i != place])
            items[place], items[other] = items[other], items[place]
        elif how == "drop" and len(items) > 1:
            del items[place]
        elif how == "double":
            items.insert(place, items[place])
        else:
            items[place] = rng.choice(task.distractors)
        answer = task.sentence(items)
        if answer != task.careful:
            return answer
