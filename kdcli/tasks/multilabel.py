"""Multi-label classification: any of several labels for a text, or for a pair of texts; also none of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from kdcli.data.columns import Column, Columns, is_missing, need_column
from kdcli.errors import InputError, cut
from kdcli.models.classes import class_names_of
from kdcli.recipe.schema import TaskSection
from kdcli.tasks.by_class import ClassScores, class_scores
from kdcli.tasks.labelled import gold
from kdcli.tasks.labels import (
    align_outputs,
    all_labels,
    check_problem,
    counted_labels,
    known_labels,
    labels_of_model,
    named_labels,
    named_outputs,
    to_ids,
)
from kdcli.tasks.replies import ranked
from kdcli.tasks.text_inputs import TextFields, TextKind

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset

    from kdcli.objectives.distribution import Distribution
    from kdcli.tasks.base import Owner

THRESHOLDS = "kdcli_thresholds"
"""The setting in config.json with the probability of each label, in their order, from which it is an answer."""

USUAL = 0.5
"""The threshold of a model that has none of its own."""

FEW = 5
"""Rows with a label below which it gets no threshold of its own."""


SCRIPT = """\
config = json.load(open(f"{sys.path[0]}/config.json", encoding="utf-8"))
for row in 1 / (1 + np.exp(-logits)):
    chosen = np.flatnonzero(row >= np.array(config.get("THRESHOLDS", USUAL)))
    print(json.dumps({"labels": [config["id2label"][str(i)] for i in chosen], "probabilities": row[chosen].tolist()}))
"""


class MultiFields(TextFields):
    """The columns of own data, and how the labels are written in them."""

    label: str | list[str] | None = Field(  # type: ignore[assignment]
        default=None,
        description="The column with the labels of a row: a list, or a text that label_separator cuts. Or a list of "
        "columns, one a label, each with 0 or 1. Left out, the column named label.",
    )
    labels: list[str] | None = Field(
        default=None,
        description="The labels in order; where the data holds whole numbers from 0, these names belong to them. Left "
        "out, those that occur, in sorted order.",
    )
    label_separator: str | None = Field(
        default=None,
        min_length=1,
        description='What stands between two labels of one cell, such as "," or "|". Left out, cells hold lists.',
    )

    def check(self, task: TaskSection) -> None:
        super().check(task)
        if isinstance(self.label, list):
            given = [name for name in ("labels", "label_separator") if getattr(self, name) is not None]
            if given:
                raise ValueError(
                    f"label names a column for each label, which leaves no place for {' and '.join(given)}"
                )
            if len(self.label) < 2 or len(set(self.label)) < len(self.label):
                raise ValueError("label as a list takes two or more columns, each once")


@dataclass(frozen=True)
class Answers:
    """What a model answers: the probability of each label, (n, labels), and which of them it chooses."""

    probabilities: "np.ndarray"
    chosen: "np.ndarray"


class MultiLabel(TextKind):
    """Any of several labels."""

    name = "multi-label"
    title = "any of several labels"
    fields = MultiFields
    provides = frozenset({"labels", "one-per-example", "text"})
    metrics = ("f1_micro", "f1_macro", "exact_match", "lrap", "auroc_macro")
    usual_metrics = ("f1_micro", "f1_macro", "exact_match")
    answer = "labels"
    ranks = True

    @property
    def distribution(self) -> "Distribution":
        from kdcli.objectives.distribution import Bernoulli

        return Bernoulli()

    def recognises(self, columns: Columns, fields: Any, source: str, notes: list[str]) -> bool:
        """True for lists of labels beside a text, and for several label columns."""
        if isinstance(fields.label, list):
            return True
        values = columns.get(fields.label or "label", Column())
        first = next((value for value in values if not is_missing(value)), None)
        texts = [next(iter(columns.get(name, Column())), None) for name in fields.columns]
        return isinstance(first, list) and all(isinstance(text, str) for text in texts)

    def read_labels(
        self, columns: Columns, fields: Any, source: str, notes: list[str], labels: tuple[str, ...] | None
    ) -> "tuple[np.ndarray, tuple[str, ...]]":
        if isinstance(fields.label, list):
            return _flags(columns, fields.label, source), tuple(fields.label)
        rows, found = self._found(columns, fields, source, notes, known := known_labels(fields.labels))
        if not found and labels is None:
            raise InputError(f"{source}: no row has a label", where="task.label")
        found = counted_labels(found, known) or found
        labels = labels or all_labels(found, known, source, notes)
        owner: Any = {"where": "task.labels", "owner": "is not in task.labels"} if known else {}
        return _table(rows, to_ids(found, labels, source, rows=rows, **owner), len(labels)), labels

    def labels_for(
        self, config: Any, columns: Columns, fields: Any, source: str, notes: list[str], names: Sequence[str] | None
    ) -> "tuple[np.ndarray, tuple[str, ...]]":
        if isinstance(fields.label, list):
            flags = _flags(columns, fields.label, source)
            numbers, labels = labels_of_model(list(fields.label), (), config, source, names)
            return flags[:, numbers.argsort()], labels
        rows, found = self._found(columns, fields, source, notes, known := known_labels(names or fields.labels))
        numbers, labels = labels_of_model(found, known, config, source, names, rows=rows)
        return _table(rows, numbers, len(labels)), labels

    def _found(
        self, columns: Columns, fields: Any, source: str, notes: list[str], known: Sequence[str]
    ) -> tuple[list[int], list[str]]:
        """Return all labels of all rows one after the other, and the numbers of their rows from 1; the last is none."""
        column = need_column(columns, fields.label or "label", "label", source)
        pairs = [(row, label) for row, cell in enumerate(column, 1) for label in _parts(cell, fields, row, source)]
        found, before = named_labels(pairs, known, source, notes), set()
        for (row, _), name in zip(pairs, found, strict=True):
            if (row, name) in before:
                raise InputError(
                    f"{source}: row {row} has the label {name!r} twice", where="task.label", hint="remove one of them"
                )
            before.add((row, name))
        return [*(row for row, _ in pairs), len(column) + 1], found

    def has_answers(self, columns: Columns, fields: Any) -> bool:
        names = fields.label if isinstance(fields.label, list) else [fields.label or "label"]
        return any(not is_missing(cell) and cell != [] for name in names for cell in columns.get(name, Column()))

    def calibration(self, train: "pa.Table") -> float:
        return 0.1

    def count(self, rows: Any, labels: Sequence[str]) -> "np.ndarray":
        return gold(rows).sum(0).astype("int64")

    def configure(self, labels: Sequence[str]) -> dict[str, Any]:
        return {**named_outputs(labels), "problem_type": "multi_label_classification"}

    def fits(self, config: Any) -> bool:
        return config.problem_type == "multi_label_classification"

    def align(self, model: Any, labels: Sequence[str], owner: "Owner", names: Sequence[str] | None = None) -> Any:
        check_problem(model.config, "multi_label_classification", owner)
        if model.config.problem_type is None:
            owner.notes.append(
                f"{owner.name} has no problem_type in its config.json: taken as a multi-label classifier"
            )
        return align_outputs(model, labels, owner, names, settings=[THRESHOLDS])

    def answers(self, model: Any, rows: "Dataset", processor: Any, *, max_length: int, ask: Any, **options: Any) -> Any:
        """Return a model's answers by its own thresholds, or 0.5 where it has none."""
        features = self.encode(rows, processor, max_length)
        found = _probabilities(ask(model, features, self.collator(processor), **options)["logits"])
        own = getattr(model.config, THRESHOLDS, None)
        return Answers(found, found >= (USUAL if own is None else own))

    def decode(self, outputs: dict[str, Any], features: "Dataset", rows: "Dataset") -> Answers:
        """Return the answers by the threshold with the best F1 that the model itself expects: no label is looked at."""
        expected = _probabilities(outputs["logits"])
        return Answers(expected, expected >= best_threshold(expected.ravel(), expected.ravel()))

    def replies(
        self, model: Any, rows: "Dataset", processor: Any, *, top: int | None = None, **options: Any
    ) -> list[dict[str, Any]]:
        """Return the labels that a model chooses for each row, in its order, and their probabilities."""
        answers = self.answers(model, rows, processor, **options)
        names, found = class_names_of(model.config), []
        for row, chosen in zip(answers.probabilities, answers.chosen, strict=True):
            mine = [i for i in range(len(names)) if chosen[i]]
            reply = {"labels": [names[i] for i in mine], "probabilities": [float(row[i]) for i in mine]}
            found.append({**reply, **({"top": ranked(names, row, top)} if top is not None else {})})
        return found

    def script_of_logits(self, config: Any) -> str:
        return SCRIPT.replace("THRESHOLDS", THRESHOLDS).replace("USUAL", str(USUAL))

    def show(self, reply: dict[str, Any]) -> str:
        pairs = zip(reply["labels"], reply["probabilities"], strict=True)
        return ", ".join(f"{label} {probability:.3f}" for label, probability in pairs) or "(no label)"

    def score(
        self, answers: Answers, rows: "Dataset", labels: Sequence[str], metrics: Sequence[str]
    ) -> dict[str, float]:
        truth = gold(rows) > 0.5
        return {name: METRICS[name](answers, truth) for name in metrics}

    def by_class(self, answers: Answers, rows: "Dataset", labels: Sequence[str]) -> dict[str, ClassScores]:
        truth = gold(rows) > 0.5
        return class_scores(labels, *(table.sum(0) for table in (truth, answers.chosen, truth & answers.chosen)))

    def calibrate(self, model: Any, rows: "Dataset", processor: Any, **options: Any) -> dict[str, Any]:
        """Return the thresholds of the labels with the best micro-F1 on these rows.

        From the best one for all labels on, each label in turn takes the one that is best beside the others'; a label
        that fewer than 5 rows have keeps that of all.
        Source: Lipton et al. 2014, "Optimal thresholding of classifiers to maximize F1 measure" (arXiv 1402.1892).
        """
        found = self.answers(model, rows, processor, **options).probabilities
        return {THRESHOLDS: thresholds(found, gold(rows))}

    def chance(self, sets: "Sequence[Dataset]", labels: Sequence[str], metric: str) -> float:
        """Return the best that the same answer to every row reaches: the most frequent labels, however many."""
        import numpy as np

        truths = [gold(rows) > 0.5 for rows in sets]
        share = np.mean([truth.mean(0) for truth in truths], axis=0)
        best = 0.0
        for number in range(len(share) + 1):
            chosen = np.isin(np.arange(len(share)), np.argsort(-share, kind="stable")[:number])
            same = [Answers(np.tile(share, (len(y), 1)), np.tile(chosen, (len(y), 1))) for y in truths]
            best = max(best, float(np.mean([METRICS[metric](a, y) for a, y in zip(same, truths, strict=True)])))
        return best


def thresholds(probabilities: "np.ndarray", truth: "np.ndarray") -> list[float]:
    """Return a threshold for each label, as `MultiLabel.calibrate` has it. probabilities, truth: (n, labels)."""
    import numpy as np

    own = np.full(truth.shape[1], best_threshold(probabilities.ravel(), truth.ravel()))
    for label in np.flatnonzero(truth.sum(0) >= FEW):
        chosen = probabilities >= own
        chosen[:, label] = False
        beside = (float(truth[chosen].sum()), float(chosen.sum()), float(truth.sum() - truth[:, label].sum()))
        own[label] = best_threshold(probabilities[:, label], truth[:, label], *beside)
    return [float(threshold) for threshold in own]


def best_threshold(
    probabilities: "np.ndarray", truth: "np.ndarray", hits: float = 0.0, chosen: float = 0.0, positives: float = 0.0
) -> float:
    """Return the probability from which answers have the best F1: in the middle between two that occur.

    probabilities: (n,). truth: (n,), 0 to 1. hits, chosen, positives: right answers, answers and labels beside these.
    """
    import numpy as np

    order = np.argsort(-probabilities, kind="stable")
    edges = np.concatenate([[1.0], probabilities[order].astype(np.float64), [0.0]])
    found = np.concatenate([[0.0], np.cumsum(truth[order], dtype=np.float64)])
    f1 = 2 * (hits + found) / np.maximum(chosen + np.arange(len(found)) + positives + truth.sum(), 1e-9)
    # Equal probabilities are chosen together, or none of them.
    f1[1:-1][edges[1:-2] == edges[2:-1]] = -1.0
    last = int(f1.argmax())
    return float((edges[last] + edges[last + 1]) / 2)


def _probabilities(logits: "np.ndarray") -> "np.ndarray":
    import numpy as np

    return 1.0 / (1.0 + np.exp(-logits.astype(np.float64)))


def _parts(cell: Any, fields: MultiFields, row: int, source: str) -> Iterator[Any]:
    """Yield the labels of a cell. Raises InputError for what is none."""
    if isinstance(cell, str) and cell.strip().startswith("[") and cell.strip().endswith("]"):
        raise InputError(
            f"{source}: the labels of row {row} are the text {cut(repr(cell))}, not a list",
            where="task.label",
            hint="keep lists in JSON lines or Parquet; in CSV write the labels alone, with task.label_separator",
        )
    if isinstance(cell, str) and fields.label_separator is not None:
        cell = [part for part in cell.split(fields.label_separator) if part.strip()]
    if is_missing(cell):
        return
    if not isinstance(cell, list):
        raise InputError(
            f"{source}: the labels of row {row} are {cut(repr(cell))}, not a list",
            where="task.label",
            hint='say what separates the labels of a text: task.label_separator = ","',
        )
    for part in cell:
        if isinstance(part, bool | list | dict | bytes) or is_missing(part):
            raise InputError(
                f"{source}: row {row} has {cut(repr(part))} among its labels, not a text or a number",
                where="task.label",
            )
        yield part


def _table(rows: Sequence[int], numbers: "np.ndarray", labels: int) -> "np.ndarray":
    """Return 1 for each label that a row has, (n, labels), fp32. rows: of each number, and that after the last row."""
    import numpy as np

    table = np.zeros((rows[-1] - 1, labels), np.float32)
    table[np.asarray(rows[:-1], np.int64) - 1, numbers] = 1.0
    return table


FLAGS = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0}


def _flags(columns: Columns, names: Sequence[str], source: str) -> "np.ndarray":
    """Return the columns of 0 and 1, (n, labels), fp32. Raises InputError for anything else in them."""
    import numpy as np

    found = []
    for name in names:
        flags = []
        for row, cell in enumerate(need_column(columns, name, "label", source), 1):
            flag = FLAGS.get(str(cell).strip().lower())
            if flag is None:
                raise InputError(
                    f"{source}: row {row} has {cut(repr(cell))} in {name!r}, not 0 or 1",
                    where="task.label",
                    hint="a label column holds 1 for the rows that have the label, and 0 for the others",
                )
            flags.append(flag)
        found.append(flags)
    return np.array(found, np.float32).T


def _f1(average: str) -> Callable[[Answers, "np.ndarray"], float]:
    def compute(answers: Answers, truth: "np.ndarray") -> float:
        from sklearn.metrics import f1_score

        return float(f1_score(truth, answers.chosen, average=average, zero_division=0))

    return compute


def _lrap(answers: Answers, truth: "np.ndarray") -> float:
    from sklearn.metrics import label_ranking_average_precision_score

    return float(label_ranking_average_precision_score(truth, answers.probabilities))


def _auroc(answers: Answers, truth: "np.ndarray") -> float:
    """Mean area under the ROC curve, over the labels that some rows have and some do not; 0.5 without any."""
    import numpy as np
    from sklearn.metrics import roc_auc_score

    labels = np.flatnonzero(truth.any(0) & ~truth.all(0))
    areas = [roc_auc_score(truth[:, label], answers.probabilities[:, label]) for label in labels]
    return float(np.mean(areas)) if areas else 0.5


METRICS: "dict[str, Callable[[Answers, np.ndarray], float]]" = {
    "f1_micro": _f1("micro"),
    "f1_macro": _f1("macro"),
    "exact_match": lambda answers, truth: float((answers.chosen == truth).all(1).mean()),
    "lrap": _lrap,
    "auroc_macro": _auroc,
}
"""F1 over all labels at once, and its mean over labels; the share of rows with all labels right; label ranking average
precision, and the area under the ROC curve, which need no thresholds."""

KIND = MultiLabel()
