"""Token classification: a tag for each word of a text, such as names in it, phrases or parts of speech."""

import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

from pydantic import Field

from kdcli.data.columns import Column, Columns, is_missing, need_column, shape_of_value
from kdcli.errors import InputError, cut
from kdcli.models.classes import class_names_of
from kdcli.models.heads import Head
from kdcli.recipe.schema import TaskSection
from kdcli.tasks.kind import Fields, TaskKind
from kdcli.tasks.labels import (
    align_outputs,
    all_labels,
    are_numbers_of,
    counted_labels,
    in_order,
    known_labels,
    labels_of_model,
    named_labels,
    named_outputs,
    readable,
    to_ids,
)
from kdcli.tasks.tag_spans import (
    OUTSIDE,
    beginnings,
    completed,
    incomplete,
    joined,
    scheme_of,
    scores_by_type,
    spans_of,
    types_of,
)
from kdcli.words import counted

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset
    from torch import Tensor

    from kdcli.objectives.distribution import Distribution
    from kdcli.signals import Prediction
    from kdcli.tasks.base import Owner, Task

TOKEN_CLASSIFICATION = Head(
    "token-classification",
    "a token classifier",
    "classifying tokens",
    "AutoModelForTokenClassification",
    ("ForTokenClassification",),
    "token-classification",
    per_token=True,
)

WORDS = ("tokens", "words", "form", "1")
TAGS = ("tags", "ner_tags", "labels", "label", "upos")
"""Columns that are taken where a recipe names none, the first that is there; of a column file, its last one."""

WRONG = 0.05
"""Share of spans that begin against their scheme from which tags are refused."""

REMEDY = "keep lists in JSON lines or Parquet; a file with a word and its tag a line is a .conll file"


SCRIPT = """\
labels = json.load(open(f"{sys.path[0]}/config.json", encoding="utf-8"))["id2label"]
tokenizer.enable_truncation(LENGTH)
for words in map(str.split, sys.argv[1:]):
    if (pieces := tokenizer.encode(WORDS, is_pretokenized=True)).overflowing:
        sys.exit(f"{len(words)} words are more than LENGTH tokens: give them in parts")
    feed = {node.name: np.array([getattr(pieces, NAMES[node.name])]) for node in session.get_inputs()}
    own = dict(zip(pieces.word_ids[::-1], session.run(["logits"], feed)[0][0, ::-1].argmax(1).astype(str)))
    tags = [labels[own[i]] if i in own else NOTHING for i in range(len(words))]
"""
"""The words of an argument are what stands between spaces. The tag of a word is that of its first piece; of one without
pieces O, or the first tag. Windows of long texts as kdcli cuts them would take more lines."""

TAGS_ALONE = """\
    print(json.dumps({"words": words, "tags": tags}))
"""

SPANS = """\
import re
    found = re.finditer(r"PATTERN", line := " ".join(tags))
    spans = [[m[m.lastindex], line.count(" ", 0, m.start()), line.count(" ", 0, m.end()) + 1] for m in found]
    print(json.dumps({"words": words, "tags": tags, "spans": spans}))
"""

PATTERNS = {
    "IOB": r"[BI]-(\S+)(?: I-\1(?!\S))*",
    "IOBES": r"S-(\S+)|B-(\S+)(?: I-\2(?!\S))* E-\2(?!\S)",
    "BILOU": r"U-(\S+)|B-(\S+)(?: I-\2(?!\S))* L-\2(?!\S)",
}
"""Spans in tags with spaces between them, as `spans_of` finds them."""


class TagFields(Fields):
    """The columns of own data, and the tags."""

    text: str | int | None = Field(
        default=None,
        description="The column with the words of a row, a list; of a column file its number from 1. Left out, the one "
        "named tokens, words or form, or the first of a column file.",
    )
    label: str | int | None = Field(
        default=None,
        description="The column with a tag for each word, a list; of a column file its number from 1, or from the last "
        "one on: -1, -2. Left out, the one named tags, ner_tags, labels, label or upos, or the last of a column file.",
    )
    labels: list[str] | None = Field(
        default=None,
        description="The tags in order; where the data holds whole numbers from 0, these names belong to them. Left "
        "out, those that occur, in sorted order.",
    )
    stride: int | None = Field(
        default=None,
        ge=0,
        description="Tokens that neighbouring windows of a row longer than max_length share at most. Left out, a "
        "quarter of a window.",
    )

    def check(self, task: TaskSection) -> None:
        given = [name for name in ("text", "label", "labels") if getattr(self, name) is not None]
        if given and not task.is_own:
            raise ValueError(f"{given[0]} = ... needs data, train or hub")


class TokenClassification(TaskKind):
    """A tag for each word. Where tags write spans (IOB1, IOB2, IOBES, BILOU), these are scored.

    Rows have the columns words and label, lists. An answer is the number of a tag for each word, -1 for a word of which
    the tokenizer leaves nothing.
    """

    name = "token-classification"
    title = "a tag for each word"
    head = TOKEN_CLASSIFICATION
    fields = TagFields
    provides = frozenset({"labels", "text"})
    text_columns = ("words",)
    metrics = ("f1", "precision", "recall", "f1_macro", "accuracy")
    usual_metrics = ("f1", "accuracy")
    features = "windows"
    answer = "tags"
    stride: int | None = None

    @property
    def distribution(self) -> "Distribution":
        from kdcli.objectives.distribution import Categorical

        return Categorical()

    def with_fields(self, fields: Any) -> "TaskKind":
        own = copy(self)
        own.stride = fields.stride
        return own

    def metrics_for(self, labels: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return all metrics for tags that write spans, and accuracy for others."""
        return (self.metrics, self.usual_metrics) if scheme_of(labels) else (("accuracy",), ("accuracy",))

    # Rows and labels

    def recognises(self, columns: Columns, fields: Any, source: str, notes: list[str]) -> bool:
        """True for lists of words beside lists of tags, also those of a column file."""
        names = _place(columns, fields.text, WORDS), _place(columns, fields.label, TAGS, last=True)
        words, tags = (next(iter(columns.get(name, Column())), None) for name in names)
        if names[0] == names[1]:
            return False
        return isinstance(words, list) and isinstance(tags, list) and all(isinstance(word, str) for word in words)

    def read(
        self, columns: Columns, fields: Any, source: str, notes: list[str], labels: tuple[str, ...] | None = None
    ) -> "tuple[pa.Table, tuple[str, ...]]":
        words, rows, found = self._found(columns, fields, source, notes, known := known_labels(fields.labels))
        training = labels is None
        found = counted_labels(found, known) or found
        if labels is None:
            # The spans of a type may all have one word here, and several elsewhere.
            labels = all_labels(found, known, source, notes)
            labels = labels if known else in_order(completed(labels))
        owner: Any = {"where": "task.labels", "owner": "is not in task.labels"} if known else {}
        numbers = to_ids(found, labels, source, rows=rows, **owner)
        check_scheme(words, found, labels, source, notes if training else [])
        return _table(words, numbers), labels

    def read_for(
        self,
        config: Any,
        columns: Columns,
        fields: Any,
        source: str,
        notes: list[str],
        names: Sequence[str] | None,
        form: Mapping[str, Any],
    ) -> "tuple[pa.Table, tuple[str, ...]]":
        words, rows, found = self._found(columns, fields, source, notes, known := known_labels(names or fields.labels))
        numbers, labels = labels_of_model(found, known, config, source, names, rows=rows)
        check_scheme(words, [labels[number] for number in numbers], labels, source, [])
        return _table(words, numbers), labels

    def _found(
        self, columns: Columns, fields: Any, source: str, notes: list[str], known: Sequence[str]
    ) -> tuple[list[list[str]], list[int], list[str]]:
        """Return the words of all rows, the numbers of their rows from 1 (for each tag), and the tags, one after the
        other."""
        words = read_words(columns, fields, source)
        name = _place(columns, fields.label, TAGS, last=True)
        cells = need_column(columns, name, "label", source)
        pairs = [
            (row, tag)
            for row, (text, cell) in enumerate(zip(words, cells, strict=True), 1)
            for tag in _tags(cell, text, row, name, source)
        ]
        return words, [row for row, _ in pairs], named_labels(pairs, known, source, notes)

    def has_answers(self, columns: Columns, fields: Any) -> bool:
        cells = columns.get(_place(columns, fields.label, TAGS, last=True), Column())
        # The hub's sets without public answers hold no tags, or numbers of none.
        return any(isinstance(cell, list) and any(not is_missing(tag) for tag in cell) for cell in cells)

    def count(self, rows: Any, labels: Sequence[str]) -> "np.ndarray":
        """Return how many rows have each of the tags."""
        import numpy as np

        counts = np.zeros(len(labels), np.int64)
        for row in _labels(rows):
            counts[np.unique(row)] += 1
        return counts

    # A model for these labels

    def configure(self, labels: Sequence[str]) -> dict[str, Any]:
        return {**named_outputs(labels), "problem_type": None}

    def align(self, model: Any, labels: Sequence[str], owner: "Owner", names: Sequence[str] | None = None) -> Any:
        return align_outputs(model, labels, owner, names)

    # What a model reads

    def processor(self, processor: Any) -> Any:
        from kdcli.tasks.pieces import check_tokenizer, with_space_before_words

        check_tokenizer(processor)
        return with_space_before_words(processor)

    def check(self, task: "Task", processor: Any, max_length: int) -> None:
        from kdcli.tasks.encode import check_room
        from kdcli.tasks.pieces import check_tokenizer

        check_tokenizer(processor)
        check_room(processor, max_length, pair=False)

    def encode(self, rows: "Dataset", processor: Any, max_length: int) -> "Dataset":
        """Return windows of rows, by row and then by place: a row for most."""
        from kdcli.tasks.pieces import encode_words

        return encode_words(rows, processor, max_length, self.stride)

    def collator(self, processor: Any) -> "Callable[[list[dict[str, Any]]], dict[str, Tensor]]":
        from kdcli.tasks.pieces import WordCollator

        return WordCollator(processor)

    def texts(self, rows: "Dataset") -> "Iterator[str]":
        from kdcli.data.rows import values_of

        return (" ".join(words) for words in values_of(rows, "words"))

    def examples(self, rows: "Dataset", processor: Any, max_length: int) -> int:
        return len(self.encode(rows, processor, max_length))

    def drawn(self, fields: Any) -> dict[str, Any]:
        return fields.model_dump(include={"stride"})

    # What a model predicts

    def predictions(
        self, output: Any, batch: "Mapping[str, Tensor]", *, everywhere: bool = False
    ) -> "list[Prediction]":
        """Return one table with a row a word, at its first piece; a window is an example of the mean over words."""
        from kdcli.objectives.distribution import row_weights
        from kdcli.signals import Prediction

        places = batch["predicted_positions"]
        target = batch["labels"].flatten()[places] if "labels" in batch else None
        return [Prediction(output.logits.flatten(0, 1)[places], row_weights(places, *batch["input_ids"].shape), target)]

    def decode(self, outputs: "dict[str, Any]", features: "Dataset", rows: "Dataset") -> "list[np.ndarray]":
        """Return the number of the tag of each word, -1 for a word of which the tokenizer leaves nothing."""
        import numpy as np

        from kdcli.data.rows import values_of

        answers = [np.full(len(words), -1) for words in values_of(rows, "words")]
        for logits, row, words in zip(
            outputs["logits"], values_of(features, "row"), values_of(features, "words"), strict=True
        ):
            numbers = np.array(words)
            answers[row][numbers[numbers >= 0]] = logits[numbers >= 0].argmax(-1)
        return answers

    def score(
        self, answers: "Sequence[np.ndarray]", rows: "Dataset", labels: Sequence[str], metrics: Sequence[str]
    ) -> dict[str, float]:
        """Return the named metrics and, beside f1, that of each type of span that gold tags have.

        f1, precision, recall: over the spans of all types. f1_macro: mean of F1 over the types that gold tags or
        answers have. accuracy: share of words.
        """
        import numpy as np

        truth, answers = _labels(rows), filled(answers, labels)
        found: dict[str, float] = {}
        if set(metrics) != {"accuracy"}:
            scheme = scheme_of(labels)
            assert scheme is not None
            own, gold = ([[labels[number] for number in row] for row in side] for side in (answers, truth))
            by_type = scores_by_type(own, gold, scheme)
            total = joined(by_type)
            found = {name: getattr(total, name) for name in ("f1", "precision", "recall")}
            found["f1_macro"] = float(np.mean([one.f1 for one in by_type.values()])) if by_type else 0.0
        found["accuracy"] = float((np.concatenate(answers) == np.concatenate(truth)).mean())
        scores = {name: found[name] for name in metrics}
        if "f1" in metrics:
            scores |= {f"f1/{kind}": one.f1 for kind, one in by_type.items() if one.gold}
        return scores

    # What a model answers to examples without gold answers

    def inputs(self, fields: Any) -> dict[str, str]:
        return {"words": "words" if fields.text is None else str(fields.text)}

    def read_inputs(self, columns: Columns, fields: Any, source: str, notes: list[str]) -> "pa.Table":
        """Return rows with the columns words and text: what was one text, which is cut into words; else null."""
        import pyarrow as pa

        name = _place(columns, fields.text, WORDS)
        cells = list(need_column(columns, name, "text", source))
        texts = [cell if isinstance(cell, str) else None for cell in cells]
        found = Column([[cell if text is None else _split(cell) for cell, text in zip(cells, texts, strict=True)]])
        words = read_words({name: found}, fields, source)
        return pa.table({"words": _array(words), "text": pa.array(texts, pa.large_string())})

    def replies(
        self, model: Any, rows: "Dataset", processor: Any, *, top: int | None = None, **options: Any
    ) -> list[dict[str, Any]]:
        """Return the words and a tag for each; and the spans that tags write, with their places in the text.

        Places are characters of the text, or of the words with spaces between them where words were given; and words.
        """
        from kdcli.data.rows import values_of

        outputs, features = self.outputs(model, rows, processor, **options)
        labels, found = class_names_of(model.config), []
        scheme, numbers = scheme_of(labels), filled(self.decode(outputs, features, rows), labels)
        for words, text, row in zip(values_of(rows, "words"), values_of(rows, "text"), numbers, strict=True):
            tags = [labels[number] for number in row]
            reply: dict[str, Any] = {"words": words, "tags": tags}
            if scheme is not None:
                text = " ".join(words) if text is None else text
                places = _places(words, text)
                reply["spans"] = [
                    {
                        "type": kind,
                        "text": text[places[first][0] : places[last][1]],
                        "start": places[first][0],
                        "end": places[last][1],
                        "words": [first, last + 1],
                    }
                    for kind, first, last in spans_of(tags, scheme)
                ]
            found.append(reply)
        return found

    def script(self, fields: Any, config: Any, processor: Any, max_length: int) -> str:
        from kdcli.tasks.pieces import lacks_spaces

        labels = class_names_of(config)
        scheme = scheme_of(labels)
        typed = scheme is not None and any("-" in label for label in labels)
        script = SCRIPT + (SPANS.replace("PATTERN", PATTERNS[scheme or "IOB"]) if typed else TAGS_ALONE)
        words = '[f" {word}" for word in words]' if lacks_spaces(processor) else "words"
        nothing = json.dumps(OUTSIDE if OUTSIDE in labels else labels[0], ensure_ascii=False)
        return script.replace("LENGTH", str(max_length)).replace("WORDS", words).replace("NOTHING", nothing)

    def show(self, reply: dict[str, Any]) -> str:
        if "spans" in reply:
            return ", ".join(f"{span['text']} [{span['type']}]" for span in reply["spans"]) or "no spans"
        return " ".join(f"{word}/{tag}" for word, tag in zip(reply["words"], reply["tags"], strict=True))

    def chance(self, sets: "Sequence[Dataset]", labels: Sequence[str], metric: str) -> float:
        """Return the accuracy of each set's most frequent tag; of spans 0, as none is found."""
        import numpy as np

        if metric != "accuracy":
            return 0.0
        truths = [np.concatenate(_labels(rows)) for rows in sets]
        return float(np.mean([np.bincount(truth).max() / len(truth) for truth in truths]))


def filled(answers: "Sequence[np.ndarray]", labels: Sequence[str]) -> "list[np.ndarray]":
    """Return answers with a tag for the words that have none: O, or where there is no O the most frequent answer."""
    import numpy as np

    joined_answers = np.concatenate(answers)
    given = joined_answers[joined_answers >= 0]
    usual = labels.index(OUTSIDE) if OUTSIDE in labels else int(np.bincount(given).argmax()) if len(given) else 0
    return [np.where(row < 0, usual, row) for row in answers]


def _split(text: str) -> list[str]:
    """Return the words of a text: what stands between white space, without the punctuation and symbols in it, which are
    words of their own."""
    apart = "".join(f" {sign} " if unicodedata.category(sign)[0] in "PS" else sign for sign in text)
    return apart.split()


def _places(words: Sequence[str], text: str) -> list[tuple[int, int]]:
    """Return where words that follow one another in a text begin and end, in characters."""
    places, end = [], 0
    for word in words:
        start = text.index(word, end)
        end = start + len(word)
        places.append((start, end))
    return places


def _labels(rows: Any) -> "list[np.ndarray]":
    """Return the tags' numbers of each row (of a table or a data set)."""
    import numpy as np
    import pyarrow as pa

    from kdcli.data.rows import values_of

    values = rows.column("label").to_pylist() if isinstance(rows, pa.Table) else values_of(rows, "label")
    return [np.array(row, np.int64) for row in values]


def _table(words: list[list[str]], numbers: "np.ndarray") -> "pa.Table":
    """Return rows. numbers: of the tags of all words, one after the other."""
    import numpy as np
    import pyarrow as pa

    ends = pa.array(np.cumsum([0, *map(len, words)]), pa.int32())
    return pa.table({"words": _array(words), "label": pa.ListArray.from_arrays(ends, pa.array(numbers))})


def _array(words: list[list[str]]) -> "pa.Array":
    import pyarrow as pa

    return pa.array(words, pa.list_(pa.large_string()))


# Columns


def _place(columns: Columns, given: str | int | None, usual: Sequence[str], *, last: bool = False) -> str:
    """Return the name of a column. given: by a recipe, also a number. last: a column file's last one is usual, too."""
    numbered = [name for name in columns if name.isdecimal()]
    if given is None:
        there = [name for name in usual if name in columns]
        return there[0] if there else numbered[-1] if numbered and last else usual[0]
    name = str(given)
    if name not in columns and name.startswith("-") and name[1:].isdecimal() and 0 < int(name[1:]) <= len(numbered):
        return numbered[int(name)]
    return name


def read_words(columns: Columns, fields: Any, source: str) -> list[list[str]]:
    """Return the words of each row. Raises InputError for a row without words, and for what is no list of them."""
    name = _place(columns, fields.text, WORDS)
    return [
        [_word(word, row, source) for word in _list(cell, row, name, "words", "task.text", source)]
        for row, cell in enumerate(need_column(columns, name, "text", source), 1)
    ]


def _list(cell: Any, row: int, name: str, what: str, where: str, source: str) -> list[Any]:
    """Return a cell that is a list. Raises InputError for one that is none, and for an empty one."""
    if cell is None or cell == []:
        raise InputError(f"{source}: row {row} has no {what} in {name!r}", where=where, hint="remove it")
    if not isinstance(cell, list):
        raise InputError(
            f"{source}: {name!r} of row {row} is {cut(repr(cell))}, not a list of {what}", where=where, hint=REMEDY
        )
    return cell


def _word(value: Any, row: int, source: str) -> str:
    if isinstance(value, str):
        return readable(value, row, source, "task.text")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    said = shape_of_value(value) if isinstance(value, list | dict | bytes) else repr(value)
    raise InputError(f"{source}: row {row} has {said} among its words, not a text", where="task.text")


def _tags(cell: Any, words: list[str], row: int, name: str, source: str) -> list[Any]:
    """Return the tags of a row. Raises InputError where there are not as many as words, and for what is no tag."""
    tags = _list(cell, row, name, "tags", "task.label", source)
    if len(tags) != len(words):
        raise InputError(
            f"{source}: row {row} has {counted(len(words), 'word')} and {counted(len(tags), 'tag')}",
            where="task.label",
            hint="each word needs a tag of its own",
        )
    for tag in tags:
        if isinstance(tag, bool | list | dict | bytes) or is_missing(tag):
            raise InputError(
                f"{source}: row {row} has {cut(repr(tag))} among its tags, not a text or a number", where="task.label"
            )
    return tags


def check_scheme(words: list[list[str]], tags: list[str], labels: Sequence[str], source: str, notes: list[str]) -> None:
    """Find out the scheme of the tags of all rows, which stand one after the other; `notes` takes it.

    Raises InputError for IOBES or BILOU tags that are of no complete span, which would not be scored, and where more
    than 5 % of the spans of IOB tags begin against their scheme; of fewer, a note tells.
    """
    ends = iter(tags)
    rows = [[next(ends) for _ in row] for row in words]
    scheme = scheme_of(labels)
    if scheme is None:
        said = "tags write no spans (no B-, I-): accuracy over words is scored"
        if are_numbers_of(labels, [str(len(labels))] * (len(labels) + 1)):
            said = "tags are numbers without names: accuracy over words is scored; task.labels names them"
        notes.append(f"{source}: {said}")
        return
    of = counted(len(types_of(labels)), "type")
    if scheme != "IOB":
        for number, row in enumerate(rows):
            if (place := incomplete(row)) is not None:
                raise InputError(
                    f"{source}: row {number + 1} has {row[place]!r} at word {place + 1} ({words[number][place]!r}), "
                    f"which is of no complete span of {scheme}",
                    where="task.label",
                    hint="a span is B-, I-, ..., E- (L- in BILOU), all of one type, or a single S- (U-)",
                )
        notes.append(f"{source}: tags are {scheme} ({of}); spans are scored")
        return
    found = beginnings(rows)
    if found.errors:
        number, place = found.first_bare if found.scheme == "IOB2" else found.first_parting
        said = (
            f"{found.errors:,} of {found.spans:,} spans begin against {found.scheme} (first: row {number + 1}, word "
            f"{place + 1}, {words[number][place]!r}, has {rows[number][place]!r})"
        )
        if found.errors > WRONG * found.spans:
            raise InputError(
                f"{source}: {said}",
                where="task.label",
                hint="in IOB2 each span begins with B-; in IOB1 only one that follows another of its type",
            )
        notes.append(f"{source}: {said}: taken as a beginning each")
    notes.append(f"{source}: tags are {found.scheme} ({of}); spans are scored")


KIND = TokenClassification()
