"""What classifiers share, whatever they read: one class out of several an example."""

import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from kdcli.data.columns import Columns
from kdcli.models.classes import class_names_of
from kdcli.tasks.by_class import ClassScores, class_scores
from kdcli.tasks.kind import Fields
from kdcli.tasks.labelled import LabelledKind, gold
from kdcli.tasks.labels import (
    align_outputs,
    all_labels,
    check_problem,
    counted_labels,
    known_labels,
    label_column,
    labels_of_model,
    named_labels,
    named_outputs,
    to_ids,
)
from kdcli.tasks.replies import ranked, softmax

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset

    from kdcli.objectives.distribution import Distribution
    from kdcli.tasks.base import Owner


RANKS = 5
"""How many of the best classes a score may look at."""
TOP = f"top{RANKS}_accuracy"
"""The share of rows whose class is among them."""


SCRIPT = """\
labels = json.load(open(f"{sys.path[0]}/config.json", encoding="utf-8"))["id2label"]
for row in logits:
    shares = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
    print(json.dumps({"label": labels[str(shares.argmax())], "probability": float(shares.max())}))
"""


class ClassFields(Fields):
    """The names of the classes."""

    labels: list[str] | None = Field(
        default=None,
        description="The classes in order; where the data holds whole numbers from 0, these names belong to them. "
        "Left out, the values in sorted order.",
    )


class ClassesKind(LabelledKind):
    """One class out of several."""

    ranks = True
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1", "mcc", "balanced_accuracy", TOP)
    usual_metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1")

    @property
    def distribution(self) -> "Distribution":
        from kdcli.objectives.distribution import Categorical

        return Categorical()

    def read_labels(
        self, columns: Columns, fields: Any, source: str, notes: list[str], labels: tuple[str, ...] | None
    ) -> "tuple[np.ndarray, tuple[str, ...]]":
        known = known_labels(fields.labels)
        found = named_labels(enumerate(label_column(columns, fields.label, source), 1), known, source, notes)
        found = counted_labels(found, known) or found
        if labels is None and not known:
            _note_mixed(found, source, notes)
        labels = labels or all_labels(found, known, source, notes)
        if known:
            return to_ids(found, labels, source, where="task.labels", owner="is not in task.labels"), labels
        return to_ids(found, labels, source), labels

    def labels_for(
        self, config: Any, columns: Columns, fields: Any, source: str, notes: list[str], names: Sequence[str] | None
    ) -> "tuple[np.ndarray, tuple[str, ...]]":
        known = known_labels(names or fields.labels)
        found = named_labels(enumerate(label_column(columns, fields.label, source), 1), known, source, notes)
        return labels_of_model(found, known, config, source, names)

    def metrics_for(self, labels: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return all metrics; of the best few classes only where there are more than these."""
        fits = partial(filter, lambda name: name != TOP or len(labels) > RANKS)
        return tuple(fits(self.metrics)), tuple(fits(self.usual_metrics))

    def strata(self, rows: "pa.Table") -> "np.ndarray":
        return gold(rows)

    def count(self, rows: Any, labels: Sequence[str]) -> "np.ndarray":
        import numpy as np

        return np.bincount(gold(rows), minlength=len(labels))

    def configure(self, labels: Sequence[str]) -> dict[str, Any]:
        return {**named_outputs(labels), "problem_type": "single_label_classification"}

    def fits(self, config: Any) -> bool:
        return config.problem_type in (None, "single_label_classification") and config.num_labels != 1

    def align(self, model: Any, labels: Sequence[str], owner: "Owner", names: Sequence[str] | None = None) -> Any:
        check_problem(model.config, "single_label_classification", owner)
        return align_outputs(model, labels, owner, names)

    def decode(self, outputs: dict[str, Any], features: "Dataset", rows: "Dataset") -> "np.ndarray":
        """Return the class numbers of the few largest logits, the largest first, (n, at most 5)."""
        # Of equal logits the first class, as argmax has it.
        return (-outputs["logits"]).argsort(-1, kind="stable")[:, :RANKS]

    def replies(
        self, model: Any, rows: "Dataset", processor: Any, *, top: int | None = None, **options: Any
    ) -> list[dict[str, Any]]:
        """Return the label and its probability for each row."""
        outputs, _ = self.outputs(model, rows, processor, **options)
        names, found = class_names_of(model.config), []
        for row in softmax(outputs["logits"]):
            best = ranked(names, row, top or 1)
            found.append({**best[0], **({"top": best} if top is not None else {})})
        return found

    def script_of_logits(self, config: Any) -> str:
        """Return the lines of `script` that print a reply for each row of `logits`, an array (n, classes)."""
        return SCRIPT

    def show(self, reply: dict[str, Any]) -> str:
        return f"{reply['label']} {reply['probability']:.3f}"

    def score(
        self, answers: "np.ndarray", rows: "Dataset", labels: Sequence[str], metrics: Sequence[str]
    ) -> dict[str, float]:
        truth = gold(rows).astype("int64")
        return {name: METRICS[name](_ranked(answers), truth, len(labels)) for name in metrics}

    def by_class(self, answers: "np.ndarray", rows: "Dataset", labels: Sequence[str]) -> dict[str, ClassScores]:
        import numpy as np

        truth, best = gold(rows).astype("int64"), _ranked(answers)[:, 0]
        counts = (np.bincount(numbers, minlength=len(labels)) for numbers in (truth, best, truth[truth == best]))
        return class_scores(labels, *counts)

    def chance(self, sets: "Sequence[Dataset]", labels: Sequence[str], metric: str) -> float:
        """Return the best that one answer for everything reaches."""
        import numpy as np

        truths = [gold(rows).astype(np.int64) for rows in sets]
        # Class 1 is what F1 asks for; elsewhere the best constant is a set's largest class.
        answers = {1, *(int(np.bincount(truth).argmax()) for truth in truths)}
        # Behind it the largest of all sets together.
        shares = np.mean([np.bincount(truth, minlength=len(labels)) / len(truth) for truth in truths], axis=0)
        order = np.argsort(-shares, kind="stable")
        rankings = [np.array([answer, *order[order != answer]])[:RANKS] for answer in (*answers, order[0])]
        measure = METRICS[metric]
        return max(
            float(np.mean([measure(np.tile(ranking, (len(truth), 1)), truth, len(labels)) for truth in truths]))
            for ranking in rankings
        )


def _note_mixed(labels: Sequence[str], source: str, notes: list[str]) -> None:
    """Note whole numbers among names, each of which becomes a class. labels: of all rows."""
    numbers = {label for label in set(labels) if re.fullmatch(r"-?\d+", label)}
    if numbers and len(numbers) < len(set(labels)):
        rows = [next(row for row, label in enumerate(labels, 1) if (label in numbers) == is_one) for is_one in (1, 0)]
        number, name = (f"{labels[row - 1]!r} in row {row}" for row in rows)
        notes.append(
            f"{source}: labels are numbers ({number}) and names ({name}), each a class of its own; if a number stands "
            "for a name, write the name"
        )


def _ranked(answers: "np.ndarray") -> "np.ndarray":
    """Return answers, (n, classes that are ranked); a kind made from this one may answer with one class, (n,)."""
    return answers.reshape(len(answers), -1)


def _f1(answers: "np.ndarray", truth: "np.ndarray", classes: int) -> float:
    """F1 of class 1 for two classes, otherwise the unweighted mean over the classes that occur."""
    from sklearn.metrics import f1_score

    average = "binary" if classes == 2 else "macro"
    return float(f1_score(truth, answers, average=average, zero_division=0))


def _mcc(answers: "np.ndarray", truth: "np.ndarray") -> float:
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings():
        # Labels of one class alone are worth 0, not a warning.
        warnings.simplefilter("ignore")
        return float(matthews_corrcoef(truth, answers))


def _balanced_accuracy(answers: "np.ndarray", truth: "np.ndarray") -> float:
    """Mean over the classes that the labels have of the share that is found."""
    import numpy as np

    return float(np.mean([(answers[truth == label] == label).mean() for label in np.unique(truth)]))


METRICS: "dict[str, Callable[[np.ndarray, np.ndarray, int], float]]" = {
    "accuracy": lambda p, y, _: float((p[:, 0] == y).mean()),
    "f1": lambda p, y, classes: _f1(p[:, 0], y, classes),
    "mcc": lambda p, y, _: _mcc(p[:, 0], y),
    "balanced_accuracy": lambda p, y, _: _balanced_accuracy(p[:, 0], y),
    TOP: lambda p, y, _: float((p == y[:, None]).any(1).mean()),
}
"""Functions of the best classes, labels and the number of classes."""
