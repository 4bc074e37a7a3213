"""Extractive question answering: the answer to a question is a part of a context, or there is none in it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from kdcli.data.columns import Column, Columns
from kdcli.errors import InputError
from kdcli.models.heads import Head
from kdcli.recipe.schema import NonNegativeInt, TaskSection, Times
from kdcli.tasks.kind import Fields, TaskKind
from kdcli.tasks.labels import named_outputs
from kdcli.tasks.references import any_given, column_of, references
from kdcli.tasks.squad_score import scores_of
from kdcli.words import counted

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset
    from torch import Tensor

    from kdcli.objectives.distribution import Distribution
    from kdcli.signals import Prediction
    from kdcli.tasks.base import Task
    from kdcli.tasks.spans import Spans

QUESTION_ANSWERING = Head(
    "question-answering",
    "a model that marks answers in a context",
    "marking answers in a context",
    "AutoModelForQuestionAnswering",
    ("ForQuestionAnswering",),
    "question-answering",
    outputs=("start_logits", "end_logits"),
    per_token=True,
)

THRESHOLD = "kdcli_no_answer_threshold"
"""The setting in config.json: how far the score of no answer is above the best answer's where none is given."""

USUAL = 0.0
"""The threshold of a model that has none of its own, on rows some of which have no answer."""

LOW = -1e30
"""The logit of a position where no answer begins or ends; finite also at any temperature."""


SCRIPT = """\
tokenizer.enable_padding(pad_id=PAD)
tokenizer.enable_truncation(LENGTH, stride=STRIDE, strategy="only_second")
for question, context in zip(sys.argv[1::2], sys.argv[2::2]):
    places = [(0, 0), *tokenizer.encode("", question := question.lstrip(), add_special_tokens=False).offsets[:MOST]]
    parts = [first := tokenizer.encode(question[: places[-1][1]], context), *first.overflowing]
    feed = {node.name: np.array([getattr(p, NAMES[node.name]) for p in parts]) for node in session.get_inputs()}
    starts, ends = np.where(np.array([p.sequence_ids for p in parts]) == 1, logits := session.run(None, feed), -np.inf)
    scores = np.where(np.tri(n := len(starts[0]), k=NEAR) > np.tri(n, k=-1), starts[..., None] + ends[:, None], -np.inf)
    part, i, j = np.unravel_index(scores.argmax(), scores.shape)
    begin, end = parts[part].offsets[i][0], parts[part].offsets[j][1]
LACKS    print(json.dumps({"answer": context[begin:end].strip(), "start": begin, "end": end}))
"""

LACKS = """\
    begin, end = (begin, end) if np.sum(logits, 0)[:, 0].min() - scores.max() <= THRESHOLD else (0, 0)
"""


class SpanFields(Fields):
    """The columns of own data, and how contexts are cut into windows and answers out of contexts."""

    columns_of_rows = frozenset({"question", "context", "answer", "answer_start"})

    question: str | None = Field(default=None, description="The column of questions. Left out, the one named question.")
    context: str | None = Field(
        default=None, description="The column of texts that hold the answers. Left out, the one named context."
    )
    answer: str | None = Field(
        default=None,
        description="The column of answers: a text, a list of texts that are all right (the first one is trained on), "
        "or the hub's {text, answer_start}; an empty one where the context holds no answer. Left out, answers or "
        "answer, whichever is there.",
    )
    answer_start: str | None = Field(
        default=None,
        description="The column of the places where answers begin, in characters of the context from 0. Left out, "
        "answer_start, where there is such a column; else an answer is searched for in its context.",
    )
    stride: NonNegativeInt | None = Field(
        default=None,
        description="Tokens that neighbouring windows of a long context share. Left out, 128, or a third of "
        "max_length where that is less.",
    )
    max_answer: Times = Field(default=30, description="The most tokens of an answer.")
    n_best: Times = Field(
        default=20,
        description="Answers of each row that share its probability, and the most of them that `kdcli predict` lists.",
    )

    def check(self, task: TaskSection) -> None:
        given = [name for name in ("question", "context", "answer", "answer_start") if getattr(self, name) is not None]
        if given and not task.is_own:
            raise ValueError(f"{given[0]} = ... needs data, train or hub")


class Part(NamedTuple):
    """A part of a context: its text, and the characters where it begins and ends."""

    text: str
    begin: int
    end: int


@dataclass(frozen=True)
class Answers:
    """What a model answers: for each row its best spans, the best first, and the parts of the context that they are.

    threshold: how far the score of no answer may be above the best span's; None where there always is an answer.
    """

    spans: "Spans"
    parts: list[list[Part]]
    threshold: float | None

    @property
    def best(self) -> list[str]:
        """The text of the best span of each row; empty for a context without tokens."""
        return [parts[0].text if parts else "" for parts in self.parts]

    @property
    def margins(self) -> "np.ndarray":
        """How far the score of no answer is above that of the best span, (rows,)."""
        return self.spans.no_answer - self.spans.scores[:, 0]

    @property
    def lacking(self) -> "np.ndarray":
        """Which rows get no answer, (rows,), boolean."""
        return self.margins > (float("inf") if self.threshold is None else self.threshold)

    @property
    def chosen(self) -> list[str]:
        """The answer to each row, empty where there is none."""
        return ["" if lacks else text for lacks, text in zip(self.lacking, self.best, strict=True)]


class QuestionAnswering(TaskKind):
    """A question, and the part of a context that answers it."""

    name = "question-answering"
    title = "the part of a context that answers a question"
    head = QUESTION_ANSWERING
    fields = SpanFields
    provides = frozenset({"labels"})
    metrics = ("f1", "exact_match", "has_answer_f1", "has_answer_exact_match", "no_answer_accuracy")
    usual_metrics = ("f1", "exact_match")
    text_columns = ("question", "context")
    features = "windows"
    answer = "answer"
    ranks = True

    def __init__(self, fields: SpanFields | None = None) -> None:
        """fields: of the task; None for their defaults."""
        self.own = fields or SpanFields()

    def with_fields(self, fields: Any) -> "QuestionAnswering":
        return QuestionAnswering(fields)

    @property
    def distribution(self) -> "Distribution":
        from kdcli.objectives.distribution import Categorical

        return Categorical()

    # Rows

    def read(
        self, columns: Columns, fields: Any, source: str, notes: list[str], labels: tuple[str, ...] | None = None
    ) -> "tuple[pa.Table, tuple[str, ...]]":
        """Return question, context, label (all right answers, none where there is none) and start (a character)."""
        import pyarrow as pa

        rows = self._texts(columns, fields, source, notes)
        contexts = iter(Column(rows["context"].chunks))
        found = list(references(columns, fields.answer, fields.answer_start, contexts, source, train=labels is None))
        texts, starts = zip(*found, strict=True)
        if labels is None and not any(texts):
            raise InputError(f"{source}: no row has an answer", where="task.answer")
        label = pa.array(texts, pa.list_(pa.large_string()))
        return pa.table({**rows, "label": label, "start": pa.array(starts, pa.int64())}), ()

    def _texts(self, columns: Columns, fields: Any, source: str, notes: list[str]) -> "dict[str, pa.ChunkedArray]":
        from kdcli.tasks.text_inputs import text_column

        rows = {name: text_column(columns, getattr(fields, name) or name, name, source) for name in self.text_columns}
        empty = {
            name: [row for row, text in enumerate(Column(rows[name].chunks), 1) if not text.strip()] for name in rows
        }
        if numbers := empty["context"]:
            raise InputError(
                f"{source}: {counted(len(numbers), 'row')} without a context, the first is row {numbers[0]}",
                where="task.context",
                hint="remove them",
            )
        if numbers := empty["question"]:
            notes.append(f"{source}: {counted(len(numbers), 'row')} without a question, the first is row {numbers[0]}")
        return rows

    def has_answers(self, columns: Columns, fields: Any) -> bool:
        return any_given(columns.get(column_of(columns, fields.answer), Column()))

    def calibration(self, train: "pa.Table") -> float:
        """Return 0.1 where some rows have no answer: how far their score must be above the others' is then chosen."""
        return 0.1 if not _answerable(train).all() else 0.0

    def hold_out(self, rows: "pa.Table", fraction: float, seed: int) -> "tuple[pa.Table, pa.Table]":
        """Return a seeded split by context, where there are enough of them: no context is on both sides."""
        import pyarrow as pa
        import pyarrow.compute as pc

        from kdcli.data.tables import split

        contexts = rows.column("context").unique()
        if not 0 < round(len(contexts) * fraction) < len(contexts):
            return super().hold_out(rows, fraction, seed)
        _, held = split(pa.table({"context": contexts}), fraction, seed)
        chosen = pc.is_in(rows.column("context"), value_set=held.column("context").combine_chunks())
        return rows.filter(pc.invert(chosen)), rows.filter(chosen)

    # A model and what it reads

    def configure(self, labels: Sequence[str]) -> dict[str, Any]:
        """Return two outputs, which the library gives no names."""
        return {**named_outputs(("LABEL_0", "LABEL_1")), "problem_type": None}

    def check(self, task: "Task", processor: Any, max_length: int) -> None:
        from kdcli.tasks.windows import room_of

        room_of(processor, max_length, self.own.stride)

    def remarks(self, task: "Task", processor: Any, max_length: int) -> list[str]:
        from kdcli.tasks.windows import count_unheld

        if not (count := count_unheld(task.train, processor, max_length, self.own.stride)):
            return []
        rows = counted(count, "training row has", "training rows have")
        return [
            f"{rows} an answer that no window holds whole, and count as without one: use a larger stride or max_length"
        ]

    def encode(self, rows: "Dataset", processor: Any, max_length: int) -> "Dataset":
        """Return windows: see `encode_windows`."""
        from kdcli.tasks.windows import encode_windows

        return encode_windows(rows, processor, max_length, self.own.stride)

    def collator(self, processor: Any) -> "Callable[[list[dict[str, Any]]], dict[str, Tensor]]":
        from kdcli.tasks.windows import WindowCollator

        return WindowCollator(processor)

    def examples(self, rows: "Dataset", processor: Any, max_length: int) -> int:
        from kdcli.tasks.windows import count_windows

        return count_windows(rows, processor, max_length, self.own.stride)

    def drawn(self, fields: Any) -> dict[str, Any]:
        # The threshold is chosen among answers of this length.
        return fields.model_dump(include={"stride", "max_answer"})

    # What a model predicts

    def predictions(
        self, output: Any, batch: "Mapping[str, Tensor]", *, everywhere: bool = False
    ) -> "list[Prediction]":
        """Return two tables, of the first and the last token, with a row a window over its positions.

        An answer begins and ends at a token of the context, or both at the position that stands for no answer in this
        window: the target of a window that does not hold the whole answer, also where another one does. All others
        have a logit of -1e30. Each window weighs the same, so a row weighs as many times as it has windows.
        """
        import torch

        from kdcli.signals import Prediction
        from kdcli.tasks.windows import CANDIDATES

        tables = []
        for side, logits in enumerate((output.start_logits, output.end_logits)):
            target = batch["labels"][:, side] if "labels" in batch else None
            tables.append(Prediction(torch.where(batch[CANDIDATES], logits.float(), LOW), target=target))
        return tables

    def script(self, fields: Any, config: Any, processor: Any, max_length: int) -> str | None:
        """Return the lines, for models with the position of no answer at the beginning."""
        from kdcli.tasks.windows import room_of

        if processor("a", "b")["input_ids"][0] not in (processor.cls_token_id, processor.bos_token_id):
            return None
        longest, most, stride = room_of(processor, max_length, self.own.stride)
        threshold = getattr(config, THRESHOLD, None)
        values = {
            "LACKS": "" if threshold is None else LACKS.replace("THRESHOLD", str(threshold)),
            "PAD": processor.pad_token_id,
            "LENGTH": longest,
            "MOST": most,
            "STRIDE": stride,
            "NEAR": self.own.max_answer - 1,
        }
        script = SCRIPT
        for name, value in values.items():
            script = script.replace(name, str(value))
        return script

    def answers(self, model: Any, rows: "Dataset", processor: Any, *, max_length: int, ask: Any, **options: Any) -> Any:
        """Return a model's answers by its own threshold, or the usual one (`decode`) where it has none."""
        found = super().answers(model, rows, processor, max_length=max_length, ask=ask, **options)
        own = getattr(model.config, THRESHOLD, None)
        return found if own is None else replace(found, threshold=own)

    def decode(self, outputs: dict[str, Any], features: "Dataset", rows: "Dataset") -> Answers:
        """Return the answers; where some rows have none, by the threshold 0: the more likely of the two."""
        import numpy as np

        from kdcli.data.rows import values_of
        from kdcli.tasks.spans import best_spans

        options = {"longest": self.own.max_answer, "most": self.own.n_best}
        spans = best_spans(outputs["start_logits"], outputs["end_logits"], windows_of(features), len(rows), **options)
        counts = np.isfinite(spans.scores).sum(1)
        columns = (values_of(rows, "context"), spans.begins, spans.ends, counts)
        parts = [
            [_part(context, *pair) for pair in zip(begins[:count].tolist(), ends[:count].tolist(), strict=True)]
            for context, begins, ends, count in zip(*columns, strict=True)
        ]
        lacking = "start" in rows.column_names and not _answerable(rows).all()
        return Answers(spans, parts, USUAL if lacking else None)

    def inputs(self, fields: Any) -> dict[str, str]:
        return {name: getattr(fields, name) or name for name in self.text_columns}

    def read_inputs(self, columns: Columns, fields: Any, source: str, notes: list[str]) -> "pa.Table":
        import pyarrow as pa

        return pa.table(self._texts(columns, fields, source, notes))

    def replies(
        self, model: Any, rows: "Dataset", processor: Any, *, top: int | None = None, **options: Any
    ) -> list[dict[str, Any]]:
        """Return the answer to each row, empty where there is none, its place in the context and its probability.

        The probability is shared by the `n_best` best answers and, of a model with a threshold, by there being none.
        """
        import numpy as np

        from kdcli.tasks.replies import softmax

        answers, found = self.answers(model, rows, processor, **options), []
        spans, none = answers.spans, {"answer": "", "start": None, "end": None}
        for row, (parts, lacks) in enumerate(zip(answers.parts, answers.lacking, strict=True)):
            each = [{"answer": text, "start": begin, "end": end} for text, begin, end in parts]
            scores = spans.scores[row, : len(each)]
            if answers.threshold is not None or not each:
                each, scores = [*each, none], np.append(scores, spans.no_answer[row])
            ranked = [{**each[i], "probability": p} for i, p in _ranked(softmax(scores))]
            best = next(reply for reply in ranked if (reply["start"] is None) == bool(lacks or not parts))
            found.append({**best, **({"top": ranked[:top]} if top is not None else {})})
        return found

    def show(self, reply: dict[str, Any]) -> str:
        return f"{reply['answer'] or '(no answer)'} {reply['probability']:.3f}"

    def show_entry(self, entry: dict[str, Any]) -> str:
        return self.show(entry) if entry["start"] is None else super().show_entry(entry)

    def calibrate(self, model: Any, rows: "Dataset", processor: Any, **options: Any) -> dict[str, Any]:
        """Return the threshold with the best F1 on these rows."""
        import numpy as np

        from kdcli.tasks.spans import best_threshold

        found = self.answers(model, rows, processor, **options)
        f1 = np.array([pair[1] for pair in _scores(found.best, rows, unanswerable=True)])
        # Of a context without tokens no span has a score.
        margins = np.clip(found.margins, -1e6, 1e6)
        return {THRESHOLD: best_threshold(margins, f1, ~_answerable(rows))}

    def score(
        self, answers: Answers, rows: "Dataset", labels: Sequence[str], metrics: Sequence[str]
    ) -> dict[str, float]:
        """Return the named metrics, by the rules of SQuAD v2.0 where some rows have no answer, else of v1.1.

        Those of the rows with an answer, and of those without, are 0 where there are none.
        """
        import numpy as np

        answerable = _answerable(rows)
        exact, f1 = np.array(list(_scores(answers.chosen, rows, unanswerable=not answerable.all()))).T
        found = {
            "f1": f1,
            "exact_match": exact,
            "has_answer_f1": f1[answerable],
            "has_answer_exact_match": exact[answerable],
            "no_answer_accuracy": exact[~answerable],
        }
        return {name: float(found[name].mean()) if len(found[name]) else 0.0 for name in metrics}

    def chance(self, sets: "Sequence[Dataset]", labels: Sequence[str], metric: str) -> float:
        """Return what the empty answer to every question reaches."""
        import numpy as np

        if metric.startswith("has_answer"):
            return 0.0
        shares = [float((~_answerable(rows)).mean()) for rows in sets]
        return float(np.mean([float(share > 0) for share in shares] if metric == "no_answer_accuracy" else shares))


def windows_of(features: "Dataset") -> Any:
    """Return what decoding needs of windows."""
    import numpy as np

    from kdcli.data.rows import array_of, values_of
    from kdcli.tasks.spans import Windows

    begins, ends = ([np.asarray(value, np.int64) for value in values_of(features, name)] for name in ("begins", "ends"))
    return Windows(
        row=array_of(features, "row"),
        first=array_of(features, "first"),
        none=array_of(features, "none"),
        begins=np.concatenate(begins),
        ends=np.concatenate(ends),
        counts=np.array([len(window) for window in begins]),
    )


def _answerable(rows: Any) -> "np.ndarray":
    """Return which rows (of a table or a data set) have an answer, (n,), boolean."""
    import pyarrow as pa

    from kdcli.data.rows import array_of

    starts = rows.column("start").to_numpy() if isinstance(rows, pa.Table) else array_of(rows, "start")
    return starts >= 0  # type: ignore[no-any-return]


def _part(context: str, begin: int, end: int) -> Part:
    """Return a part of a context without white space around it: some tokens hold the space before a word."""
    text = context[begin:end]
    begin += len(text) - len(text.lstrip())
    return Part(text.strip(), begin, begin + len(text.strip()))


def _ranked(probabilities: "np.ndarray") -> list[tuple[int, float]]:
    """Return the places of probabilities and those, the highest first."""
    return [(int(i), float(probabilities[i])) for i in (-probabilities).argsort(kind="stable")]


def _scores(texts: Sequence[str], rows: "Dataset", *, unanswerable: bool) -> Iterator[tuple[float, float]]:
    """Yield exact match and F1 of each text."""
    from kdcli.data.rows import values_of

    for text, references_of_row in zip(texts, values_of(rows, "label"), strict=True):
        yield scores_of(text, references_of_row, unanswerable=unanswerable)


KIND = QuestionAnswering()
