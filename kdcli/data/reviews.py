"""The built-in `reviews` task: sentences about films and places, made up on the spot from a seed.

Each example states an opinion and the label says whether it is positive. What decides is always in the text, but
not always on its surface: opinions are negated ("not at all dull"), contrasted ("awful start, but a gripping
end": the clause after "but" wins; with "although" the main clause wins), strengthened, and buried among clauses
that say nothing. Every label is then flipped with probability NOISE, in training and validation alike, so that
no model can be right more often than 1 - NOISE in the long run. No sentence of the training set is in the
validation set.
"""

import random

from kdcli.data.columns import Column, Columns
from kdcli.data.sets import NamedSet

NOISE = 0.06
LABELS = ("negative", "positive")
SIZES = {"train": 8000, "validation": 1000}

POSITIVE = [
    "gripping",
    "brilliant",
    "moving",
    "charming",
    "delightful",
    "superb",
    "clever",
    "touching",
    "fresh",
    "graceful",
    "witty",
    "splendid",
    "warm",
    "thrilling",
    "tender",
    "lively",
    "elegant",
    "funny",
    "memorable",
    "inspired",
]
NEGATIVE = [
    "dull",
    "awful",
    "clumsy",
    "boring",
    "tedious",
    "shallow",
    "lazy",
    "dreadful",
    "bland",
    "messy",
    "stale",
    "cold",
    "tiresome",
    "hollow",
    "noisy",
    "pointless",
    "sloppy",
    "grim",
    "forgettable",
    "weak",
]
SUBJECTS = [
    "the film",
    "the plot",
    "the acting",
    "the script",
    "the music",
    "the ending",
    "the cast",
    "the hotel",
    "the menu",
    "the service",
    "the story",
    "the direction",
    "this novel",
    "the second half",
    "the dialogue",
    "the exhibition",
]
STRONG = ("really", "truly", "utterly", "quite", "rather", "so", "very", "simply")
_NOT = ("not {}", "never {}", "not at all {}", "hardly {}", "far from {}", "anything but {}")
FILLERS = [
    "we went on a tuesday",
    "it runs for two hours",
    "my brother came along",
    "the tickets were at the door",
    "it was shot in norway",
    "there were nine of us",
    "the poster is blue",
    "they serve tea at four",
    "i read about it in the paper",
    "the room was half full",
    "it had rained all day",
    "it opens again in may",
    "the author lives in lisbon",
    "a friend had lent me a copy",
]


def _opinion(generator: random.Random, positive: bool) -> str:
    """Return a clause with an opinion of the given sign, negated in about a third of the cases."""
    negated = generator.random() < 0.35
    word = generator.choice(POSITIVE if positive != negated else NEGATIVE)
    if not negated and generator.random() < 0.4:
        word = f"{generator.choice(STRONG)} {word}"
    phrase = generator.choice(_NOT).format(word) if negated else word
    verb = generator.choice(("was", "seemed", "felt", "is"))
    return f"{generator.choice(SUBJECTS)} {verb} {phrase}"


def _sentence(generator: random.Random, positive: bool) -> str:
    """Return a whole example whose true label is `positive`."""
    kind = generator.random()
    if kind < 0.40:
        core = _opinion(generator, positive)
    elif kind < 0.65:
        core = f"{_opinion(generator, not positive)} , but {_opinion(generator, positive)}"
    elif kind < 0.82:
        core = f"although {_opinion(generator, not positive)} , {_opinion(generator, positive)}"
    elif kind < 0.92:
        core = f"{_opinion(generator, positive)} , even if {_opinion(generator, not positive)}"
    else:
        core = f"{_opinion(generator, positive)} and {_opinion(generator, positive)}"
    parts = [core]
    for _ in range(generator.choice((0, 0, 1, 1, 2))):
        parts.insert(generator.randrange(len(parts) + 1), generator.choice(FILLERS))
    return " . ".join(parts)


def reviews(seed: int = 0) -> dict[str, dict[str, list]]:
    """Return {"train": ..., "validation": ...} with the columns text and label (and truth, before the noise)."""
    generator = random.Random(f"reviews-{seed}")
    splits: dict[str, dict[str, list]] = {}
    trained: set[str] = set()
    for split, size in SIZES.items():
        rows: dict[str, list] = {"text": [], "label": [], "truth": []}
        for _ in range(size):
            truth = generator.random() < 0.5
            sentence = _sentence(generator, truth)
            while sentence in trained:
                sentence = _sentence(generator, truth)
            rows["text"].append(sentence)
            rows["truth"].append(int(truth))
            rows["label"].append(int(truth) ^ int(generator.random() < NOISE))
        trained = set(rows["text"])
        splits[split] = rows
    return splits


def _columns(seed: int) -> dict[str, Columns]:
    return {
        name: {column: Column.of(rows[column]) for column in ("text", "label")} for name, rows in reviews(seed).items()
    }


REVIEWS = NamedSet(
    "reviews",
    "classification",
    {"text": "text", "labels": list(LABELS)},
    ("accuracy",),
    f"built-in generator, label noise {NOISE}",
    _columns,
)
