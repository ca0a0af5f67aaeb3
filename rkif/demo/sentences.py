"""Four small classification tasks: sentences generated from word lists."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rkif.seeding import derive_seed

# fmt: off
DISHES = (
    "soup", "bread", "salad", "pasta", "rice", "curry", "pizza", "cake", "tea", "coffee", "cheese", "fish",
    "stew", "omelette", "pancake", "dumpling",
)
STAFF = ("waiter", "cook", "owner", "barista", "host", "manager", "cashier", "baker")
PRAISE = (
    "delicious", "friendly", "fresh", "wonderful", "warm", "lovely", "generous", "perfect", "charming",
    "excellent",
)
BLAME = ("cold", "rude", "stale", "awful", "slow", "bland", "greedy", "burnt", "gloomy", "terrible")

PEOPLE = (
    "anna", "ben", "carla", "david", "emma", "felix", "greta", "hugo", "iris", "jonas", "karla", "leo",
    "mira", "nils", "olga", "paul",
)
VERBS = ("paint", "repair", "visit", "clean", "open", "carry", "build", "watch", "follow", "count")
THINGS = (
    "wall", "bicycle", "museum", "window", "box", "boat", "tower", "bird", "river", "coin", "bridge", "clock",
)

TOPICS = {
    "sport": (
        "match", "goal", "referee", "team", "coach", "league", "stadium", "runner", "medal", "striker",
    ),
    "money": ("bank", "shares", "market", "profit", "tax", "loan", "investor", "price", "budget", "trader"),
    "science": (
        "laboratory", "atom", "telescope", "genome", "theory", "particle", "fossil", "microscope",
        "experiment", "planet",
    ),
    "weather": ("storm", "rain", "snow", "wind", "cloud", "thunder", "fog", "heat", "frost", "drizzle"),
}
PLACES = {
    "kitchen": ("oven", "kettle", "spoon", "fridge", "pan", "sink", "recipe", "apron"),
    "garden": ("lawn", "rose", "shovel", "hedge", "bee", "pond", "tulip", "rake"),
    "office": ("printer", "desk", "meeting", "email", "stapler", "folder", "monitor", "invoice"),
    "harbour": ("ship", "anchor", "gull", "pier", "crane", "sailor", "lighthouse", "net"),
}
# fmt: on


@dataclass(frozen=True)
class Sentences:
    """A task: a question, its labels, and a generator of sentences for a label."""

    instruction: str
    labels: tuple[str, ...]

    def sentence(self, label: str, rng: random.Random) -> str:
        raise NotImplementedError


class Review(Sentences):
    """Praise or blame; "not" inverts it."""

    def sentence(self, label: str, rng: random.Random) -> str:
        negated = rng.random() < 0.3
        words = PRAISE if (label == "good") != negated else BLAME
        subject = rng.choice(DISHES + STAFF)
        verdict = f"was {'not ' if negated else ''}{rng.choice(words)}"
        return f"the {subject} {verdict} when {rng.choice(PEOPLE)} came"


class Tense(Sentences):
    """Only the auxiliary verb tells the tense."""

    def sentence(self, label: str, rng: random.Random) -> str:
        auxiliary = {"past": "did", "present": "does", "future": "will"}[label]
        return f"{rng.choice(PEOPLE)} {auxiliary} {rng.choice(VERBS)} the {rng.choice(THINGS)}"


@dataclass(frozen=True)
class Topical(Sentences):
    """Two words of the label's list, among words that do not depend on the label."""

    lists: Mapping[str, tuple[str, ...]]

    def sentence(self, label: str, rng: random.Random) -> str:
        first, second = rng.sample(self.lists[label], 2)
        return f"{rng.choice(PEOPLE)} told {rng.choice(PEOPLE)} about the {first} and the {second}"


TASKS: dict[str, Sentences] = {
    "review": Review("Was the visit good or bad?", ("good", "bad")),
    "topic": Topical("What is the news about?", tuple(TOPICS), TOPICS),
    "tense": Tense("When does it happen?", ("past", "present", "future")),
    "place": Topical("Where are they?", tuple(PLACES), PLACES),
}


def write_tasks(folder: Path, *, train: int, dev: int, seed: int) -> None:
    """Write the tasks in the layout that ``rkif run`` reads: ``tasks.json``, ``train.jsonl``, ``dev.jsonl``.

    Args:
        folder: created if it is missing.
        train, dev: numbers of records per task; no sentence is in both splits.
        seed: seed of the sentences.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = {
        name: {
            "instruction": f"{task.instruction} Options: {', '.join(task.labels)}.\n",
            "labels": task.labels,
        }
        for name, task in TASKS.items()
    }
    (folder / "tasks.json").write_text(
        json.dumps({"tasks": table, "orders": {"demo": list(TASKS)}}, indent=1)
    )
    records = {name: _records(name, task, train + dev, seed) for name, task in TASKS.items()}
    for split, part in (("train", slice(None, train)), ("dev", slice(train, None))):
        lines = [json.dumps(record) + "\n" for rows in records.values() for record in rows[part]]
        (folder / f"{split}.jsonl").write_text("".join(lines))


def _records(name: str, task: Sentences, count: int, seed: int) -> Sequence[dict[str, str]]:
    rng = random.Random(derive_seed(seed, "demo", name))
    sentences: dict[str, str] = {}
    while len(sentences) < count:
        label = task.labels[len(sentences) % len(task.labels)]
        sentences.setdefault(task.sentence(label, rng), label)
    return [
        {"task": name, "id": f"{name}-{index}", "input": f"{sentence}\nAnswer:", "output": label}
        for index, (sentence, label) in enumerate(sentences.items())
    ]
