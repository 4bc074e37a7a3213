"""Sentence embeddings: a student follows its teacher's embeddings of texts that need no labels."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from kdcli.data.columns import Column, Columns, is_missing, need_column
from kdcli.data.sentences import Unit
from kdcli.errors import InputError, cut
from kdcli.models.heads import SENTENCE_EMBEDDING
from kdcli.recipe.schema import TaskSection
from kdcli.tasks import ranking
from kdcli.tasks.kind import Fields, TaskKind
from kdcli.tasks.numbers import number_of
from kdcli.tasks.regression import METRICS as CORRELATIONS
from kdcli.words import counted

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset
    from torch import Tensor

    from kdcli.data.sets import NamedSet
    from kdcli.objectives.distribution import Distribution
    from kdcli.signals import Prediction
    from kdcli.tasks.base import Task

PAIR = ("sentence1", "sentence2")
"""The usual columns of a pair of texts, as sets of semantic textual similarity have them."""

PAIR_METRICS = ("spearman", "pearson")

SCORES = ("score", "similarity", "label")
"""The usual columns of a pair's similarity."""

IDS = {
    "query": ("query-id", "query_id", "query"),
    "document": ("corpus-id", "corpus_id", "document_id", "document"),
    "grade": ("score", "relevance"),
}
"""The usual columns of relevances, BEIR's own first."""


SCRIPT = """\
tokenizer.enable_padding(pad_id=PAD)
tokenizer.enable_truncation(LENGTH)
encodings = tokenizer.encode_batch(TEXTS)
feed = {node.name: np.array([getattr(e, NAMES[node.name]) for e in encodings]) for node in session.get_inputs()}
[embeddings] = session.run(["sentence_embedding"], feed)
units = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
for row, cosine in zip(embeddings, units @ units[0]):
    print(json.dumps({"cosine_with_first": float(cosine), "embedding": row.tolist()}))
"""


class EmbeddingFields(Fields):
    """Which texts are trained on, and what models are scored on: pairs with a similarity, or queries and documents."""

    columns_of_rows = frozenset({"text"})
    of_parts = frozenset({"pairs", "pair", "label", "queries", "corpus", "relevances"})

    text: str | list[str] | None = Field(
        default=None,
        description="The text column of tables, or several, each of whose cells is a text of its own. Left out, the "
        "column named text, which is cut into sentences.",
    )
    unit: Unit | None = Field(
        default=None,
        description='What is embedded in training: "sentences", "paragraphs" (lines), or whole "texts" (cells or '
        'files). Left out, sentences of plain text, and "texts" where text names columns.',
    )
    pairs: str | None = Field(
        default=None,
        description="Pairs of texts with their similarity, for Spearman's correlation with the cosine of their "
        'embeddings: a file, or the name of such a set, "stsb" (its validation rows). No model is trained on them. '
        "Left out with the queries, too, the only score is the loss on held-out text.",
    )
    pair: list[str] | None = Field(
        default=None,
        min_length=2,
        max_length=2,
        description="The two text columns of the file of pairs. Left out, sentence1 and sentence2.",
    )
    label: str | None = Field(
        default=None,
        description="The column of the file of pairs with the similarity, a number on any scale. Left out, the one "
        "named score, similarity or label.",
    )
    queries: str | None = Field(
        default=None,
        description="A file of queries (id or _id, text), for the retrieval of documents. Left out, nothing is "
        "retrieved.",
    )
    corpus: str | None = Field(
        default=None,
        description="The file of documents (id or _id, text, and a title in front of it where there is one) that "
        "queries look for. Left out, nothing is retrieved.",
    )
    relevances: str | None = Field(
        default=None,
        description="The file that says which documents answer a query (query-id, corpus-id, and a score where some "
        "do so better than others). Left out, nothing is retrieved.",
    )

    @field_validator("text")
    @classmethod
    def _some(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and (not value or len(set(value)) < len(value)):
            raise ValueError("text takes a column, or several, each once")
        return value

    @property
    def columns(self) -> list[str]:
        """The columns of text."""
        return [self.text or "text"] if not isinstance(self.text, list) else self.text

    @property
    def retrieves(self) -> bool:
        """Whether queries are to find documents."""
        return self.corpus is not None

    def check(self, task: TaskSection) -> None:
        if self.pairs is not None and (self.queries or self.corpus or self.relevances):
            raise ValueError("give pairs, or queries, corpus and relevances: one task has one kind of score")
        if task.test is not None:
            raise ValueError("pairs (or queries, corpus and relevances) name what models are scored on, not test")


class SentenceEmbedding(TaskKind):
    """A vector for a text, so that texts of like meaning point in like directions.

    Training rows hold a text each. Rows that are scored are pairs (text, text_pair, label), each with two features; or
    queries and documents: `text`, `is_query`, and of queries the numbers of their relevant `documents` and `grades`.
    """

    name = "sentence-embedding"
    title = "an embedding of a text"
    head = SENTENCE_EMBEDDING
    fields = EmbeddingFields
    provides = frozenset({"embedding", "one-per-example", "text"})
    metrics: ClassVar[tuple[str, ...]] = (*PAIR_METRICS, *ranking.METRICS)
    usual_metrics: ClassVar[tuple[str, ...]] = PAIR_METRICS
    # The rows that are scored choose nothing: checkpoints are chosen by the loss on held-out text.
    scored_by_outputs = False
    unscored = "give task.pairs, or task.queries, task.corpus and task.relevances"
    text_columns = ("text", "text_pair")
    answer = vector = "embedding"

    @property
    def distribution(self) -> "Distribution":
        from kdcli.objectives.distribution import Direction

        return Direction()

    def with_fields(self, fields: Any) -> TaskKind:
        return RETRIEVAL if fields.retrieves else SIMILARITY

    def reads(self, named: "NamedSet") -> bool:
        """True for sets of pairs of texts with a number each."""
        return named.kind == "regression" and len(named.fields["text"]) == 2

    # Rows

    def splits(self, section: TaskSection, fields: Any, base: Path, notes: list[str]) -> tuple[dict[str, Columns], str]:
        from kdcli.data import sentences
        from kdcli.data.sets import named_sets

        named = None if section.is_own or _is_plain(section) else named_sets().get(section.name)
        if named is not None and self.reads(named):
            _check_columns(named, fields, ["text", *(["pair", "label"] if fields.pairs is None else [])])
            texts, source = {"train": _sentences_of(named, section)}, f"{named.source} train"
        else:
            texts, source = _documents(section, fields, base, notes)
        unit: Unit = fields.unit or ("sentences" if fields.text is None and named is None else "texts")
        found: dict[str, Columns] = {}
        seen: set[str] = set()
        for name in ("validation", "train"):
            # What is held out is not trained on.
            parts = [part for part in sentences.cut(texts.get(name, ()), unit) if part not in seen]
            if name == "validation":
                seen.update(parts)
            if parts or name == "train":
                found[name] = {"text": Column.of(parts)}
        if not len(found["train"]["text"]):
            raise InputError(f"{source} has no text", where="task")
        scored = _scored(section, fields, base, notes, named)
        return {**found, **({"test": scored} if scored is not None else {})}, source

    def read(
        self, columns: Columns, fields: Any, source: str, notes: list[str], labels: tuple[str, ...] | None = None
    ) -> "tuple[pa.Table, tuple[str, ...]]":
        import pyarrow as pa

        from kdcli.data.tables import table_of

        texts = {name: columns[name] for name in self.text_columns if name in columns}
        rows = table_of(texts)
        for name in ("label", "is_query", "documents", "grades"):
            if name in columns:
                rows = rows.append_column(name, pa.array(list(columns[name])))
        return rows, ()

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
        if fields.retrieves or fields.relevances is not None:
            found = _retrieval(columns, fields, source, Path(), notes, form)
        else:
            pair = fields.columns if fields.text is not None and fields.pair is None else fields.pair
            if pair is not None and len(pair) != 2:
                raise InputError("pairs have two columns of text", where="--text", hint="give --text FIRST,SECOND")
            found = _pairs(columns, pair or PAIR, fields.label, source, "--data", field="text")
        return self.read(found, fields, source, notes)

    def is_scored(self, rows: "pa.Table") -> bool:
        """Return whether rows are pairs, or queries and documents."""
        return len(rows.column_names) > 1

    def draw(self, rows: "pa.Table", size: int | None, seed: int) -> "pa.Table":
        """Return a fixed random subset: of queries, whose documents all stay."""
        import pyarrow as pa

        from kdcli.data.tables import subset

        if "is_query" not in rows.column_names:
            return subset(rows, size, seed)
        queries, documents = rows.filter(rows["is_query"]), rows.filter(pa.compute.invert(rows["is_query"]))
        return pa.concat_tables([subset(queries, size, seed), documents])

    def has_answers(self, columns: Columns, fields: Any) -> bool:
        return len(columns) > 1

    def configure(self, labels: Sequence[str]) -> dict[str, Any]:
        return {}

    # What a model reads

    def check(self, task: "Task", processor: Any, max_length: int) -> None:
        from kdcli.models.sentence_folder import longest_text
        from kdcli.tasks.encode import check_room

        check_room(processor, longest_text(processor, max_length), pair=False)

    def encode(self, rows: "Dataset", processor: Any, max_length: int) -> "Dataset":
        """Return each text as a feature of its own, with the prompt that the model has for it.

        The two of a pair have the column `row`, the pair's position.
        """
        from kdcli.data.rows import batches_of, stored

        return stored(_encoded(rows, batches_of(rows), processor, max_length))

    def collator(self, processor: Any) -> "Callable[[list[dict[str, Any]]], dict[str, Tensor]]":
        from kdcli.tasks.encode import Collator

        return Collator(processor)

    # What a model predicts

    def predictions(
        self, output: Any, batch: "Mapping[str, Tensor]", *, everywhere: bool = False
    ) -> "list[Prediction]":
        """Return one table with a row an example, its embedding (batch, width); there is no gold answer."""
        from kdcli.signals import Prediction

        return [Prediction(output.sentence_embedding)]

    def decode(self, outputs: dict[str, Any], features: "Dataset", rows: "Dataset") -> "np.ndarray":
        """Return the embeddings of all texts: of pairs (n, 2, width), else (n, width)."""
        found = outputs["sentence_embedding"]
        return found.reshape(-1, 2, found.shape[-1]) if "text_pair" in rows.column_names else found

    def score(
        self, answers: "np.ndarray", rows: "Dataset", labels: Sequence[str], metrics: Sequence[str]
    ) -> dict[str, float]:
        import numpy as np

        from kdcli.data.rows import array_of, values_of

        if "text_pair" in rows.column_names:
            first, second = (ranking.unit(answers[:, i]) for i in range(2))
            cosines, truth = (first * second).sum(-1), array_of(rows, "label")
            return {name: CORRELATIONS[name](cosines, truth) for name in metrics}
        of_query = array_of(rows, "is_query")
        relevant = [
            (np.asarray(numbers), np.asarray(grades))
            for numbers, grades in zip(values_of(rows, "documents"), values_of(rows, "grades"), strict=True)
            if numbers is not None
        ]
        found = ranking.ranking_scores(answers[of_query], answers[~of_query], relevant)
        return {name: found[name] for name in metrics}

    def chance(self, sets: "Sequence[Dataset]", labels: Sequence[str], metric: str) -> float | None:
        """Return 0 for correlations."""
        return 0.0 if metric in PAIR_METRICS else None

    # Replies

    def inputs(self, fields: Any) -> dict[str, str]:
        return {"text": fields.columns[0]}

    def read_inputs(self, columns: Columns, fields: Any, source: str, notes: list[str]) -> "pa.Table":
        import pyarrow as pa

        from kdcli.tasks.text_inputs import read_texts

        return pa.table(read_texts(columns, fields.columns[:1], source))

    def replies(
        self, model: Any, rows: "Dataset", processor: Any, *, top: int | None = None, **options: Any
    ) -> list[dict[str, Any]]:
        """Return the embedding of each text, an array (width,)."""
        outputs, _ = self.outputs(model, rows, processor, **options)
        return [{"embedding": row} for row in outputs["sentence_embedding"]]

    def script(self, fields: Any, config: Any, processor: Any, max_length: int) -> str:
        from kdcli.models.sentence_folder import longest_text, prompt_of

        prompt = prompt_of(processor)
        values = {
            "PAD": str(processor.pad_token_id),
            "LENGTH": str(longest_text(processor, max_length)),
            "TEXTS": f"[{prompt!r} + text for text in sys.argv[1:]]" if prompt else "sys.argv[1:]",
        }
        script = SCRIPT
        for name, value in values.items():
            script = script.replace(name, value)
        return script

    def show(self, reply: dict[str, Any]) -> str:
        found = reply["embedding"]
        return f"{len(found)} numbers: {', '.join(f'{value:.4f}' for value in found[:6])}, ..."

    def beside(self, reply: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        """Return the cosine of the two embeddings; None where they have different widths."""
        own, others = reply["embedding"], other["embedding"]
        same = len(own) == len(others)
        return {"cosine": float(ranking.unit(own[None])[0] @ ranking.unit(others[None])[0]) if same else None}


class Similarity(SentenceEmbedding):
    """The same, scored on pairs of texts, if at all."""

    metrics = PAIR_METRICS


class Retrieval(SentenceEmbedding):
    """The same, scored on queries that are to find documents."""

    metrics = usual_metrics = ranking.METRICS

    def scored(self, rows: Any) -> int:
        """Return how many queries there are; documents are not scored."""
        if "is_query" not in rows.column_names:
            return len(rows)
        found = rows["is_query"]
        return sum(found.to_pylist() if hasattr(found, "to_pylist") else found[:])


KIND = SentenceEmbedding()
SIMILARITY = Similarity()
RETRIEVAL = Retrieval()


def _is_plain(section: TaskSection) -> bool:
    """True where the data folder has plain text of that name."""
    from kdcli.data.documents import corpus_folder

    return corpus_folder(section.name) is not None


def _documents(
    section: TaskSection, fields: EmbeddingFields, base: Path, notes: list[str]
) -> tuple[dict[str, list[str]], str]:
    """Return the texts of "train" and, if there are any, of "validation", and where they come from."""
    from kdcli.data.documents import read_documents

    found: dict[str, list[str]] = {}
    source = ""
    for column in fields.columns:
        texts, source = read_documents(section, column, base, notes)
        for name, values in texts.items():
            found.setdefault(name, []).extend(values)
    return found, source


def _check_columns(named: "NamedSet", fields: EmbeddingFields, names: Sequence[str]) -> None:
    """Raise InputError for fields that name columns of a set, which has its own."""
    for name in names:
        if getattr(fields, name) is not None:
            raise InputError(
                f"{named.name} has columns of its own: {name} names those of a file",
                where=f"task.{name}",
                hint="leave it out",
            )


def _sentences_of(named: "NamedSet", section: TaskSection) -> list[str]:
    """Return both sentences of every training pair."""
    train = named.read(section.split_seed)["train"]
    return [text for name in named.fields["text"] for text in train[name]]


def _scored(
    section: TaskSection, fields: EmbeddingFields, base: Path, notes: list[str], named: "NamedSet | None"
) -> Columns | None:
    """Return the rows that models are scored on; None without any."""
    from kdcli.data.files import read_file
    from kdcli.data.own import placed_at
    from kdcli.data.sets import named_sets

    if fields.pairs is None and (idle := [name for name in ("pair", "label") if getattr(fields, name) is not None]):
        raise InputError(
            f"{idle[0]} is of pairs, and there are none", where=f"task.{idle[0]}", hint="give task.pairs, too"
        )
    form: Any = {"delimiter": section.delimiter, "encoding": section.encoding}
    if fields.queries is not None or fields.retrieves or fields.relevances is not None:
        if fields.queries is None:
            raise InputError(
                "retrieval needs queries, corpus and relevances: there are no queries", where="task.queries"
            )
        path = placed_at(fields.queries, base, "task.queries")
        columns = read_file(path, "task.queries", notes=notes, **form)
        return _retrieval(columns, fields, fields.queries, base, notes, form)
    known = named_sets().get(fields.pairs) if fields.pairs is not None else named
    if known is not None and KIND.reads(known):
        _check_columns(known, fields, ["pair", "label"])
        columns = known.read(section.split_seed)["validation"]
        return _pairs(columns, known.fields["text"], "label", f"{known.source} validation", "task.pairs")
    if fields.pairs is None:
        return None
    if known is not None or not Path(fields.pairs).suffix:
        sets = ", ".join(name for name, each in named_sets().items() if KIND.reads(each))
        raise InputError(
            f"{fields.pairs!r} is neither a file nor a set of pairs with a similarity; such sets are: {sets}",
            where="task.pairs",
        )
    columns = read_file(placed_at(fields.pairs, base, "task.pairs"), "task.pairs", notes=notes, **form)
    return _pairs(columns, fields.pair or PAIR, fields.label, fields.pairs, "task.pairs")


def _pairs(
    columns: Columns, pair: Sequence[str], label: str | None, source: str, where: str, *, field: str = "pair"
) -> Columns:
    """Return the columns text, text_pair and label. Raises InputError, with the row, for what cannot be scored.

    where: what names the file. field: of `[task]`, which names the columns of text.
    """
    from kdcli.tasks.text_inputs import text_columns

    for name in pair:
        need_column(columns, name, field, source)
    texts = text_columns(columns, pair, source)
    name = label or next((each for each in SCORES if each in columns), SCORES[0])
    numbers = [
        number_of(value, f"{source}: row {row}: the similarity")
        for row, value in enumerate(need_column(columns, name, "label", source), 1)
    ]
    if len(set(numbers)) < 2:
        raise InputError(f"{source}: all similarities are equal: nothing correlates with them", where=where)
    return {**{key: Column(value.chunks) for key, value in texts.items()}, "label": Column([numbers])}


def _retrieval(
    columns: Columns, fields: EmbeddingFields, source: str, base: Path, notes: list[str], form: Mapping[str, Any]
) -> Columns:
    """Return the columns text, is_query, documents and grades: of queries first, then of documents.

    columns: of the queries. form: the delimiter and the encoding of the other files. Raises InputError for what cannot
    be scored; notes take queries without a relevant document, which are left out.
    """
    from kdcli.data.files import read_file
    from kdcli.data.own import placed_at

    for name in ("corpus", "relevances"):
        if getattr(fields, name) is None:
            raise InputError(
                f"retrieval needs queries, corpus and relevances: there is no {name}", where=f"task.{name}"
            )
    assert fields.corpus is not None and fields.relevances is not None
    corpus = read_file(placed_at(fields.corpus, base, "task.corpus"), "task.corpus", notes=notes, **form)
    table = read_file(placed_at(fields.relevances, base, "task.relevances"), "task.relevances", notes=notes, **form)
    queries, documents = _by_id(columns, source, "queries"), _by_id(corpus, fields.corpus, "corpus")
    relevant = _relevant(table, queries, documents, fields)
    answered = [key for key in queries if relevant[key]]
    if not answered:
        raise InputError(f"{fields.relevances}: no query has a relevant document", where="task.relevances")
    if missing := len(queries) - len(answered):
        first = next(key for key in queries if not relevant[key])
        notes.append(
            f"{counted(missing, 'query', 'queries')} without a relevant document (first: {first!r}) are not scored"
        )
    places = {key: number for number, key in enumerate(documents)}
    notes.append(f"{counted(len(answered), 'query', 'queries')}, {counted(len(documents), 'document')}")
    texts = [*(queries[key] for key in answered), *documents.values()]
    found = [relevant[key] for key in answered]
    rest = [None] * len(documents)
    return {
        "text": Column.of(texts),
        "is_query": Column([[True] * len(answered) + [False] * len(documents)]),
        "documents": Column([[*([places[key] for key in grades] for grades in found), *rest]]),
        "grades": Column([[*(list(grades.values()) for grades in found), *rest]]),
    }


def _by_id(columns: Columns, source: str, what: Literal["queries", "corpus"]) -> dict[str, str]:
    """Return texts by their ids; a title stands in front of its text, as in BEIR."""
    ids = need_column(columns, "_id" if "_id" in columns else "id", what, source)
    titles: Sequence[Any] = columns.get("title", Column([[""] * len(ids)]))
    found: dict[str, str] = {}
    for row, (key, title, text) in enumerate(
        zip(ids, titles, need_column(columns, "text", what, source), strict=True), 1
    ):
        where, key = f"task.{what}", str(key)
        if key in found:
            raise InputError(f"{source}: row {row} has the id {cut(repr(key))} a second time", where=where)
        joined = " ".join(str(part) for part in (title, text) if not is_missing(part))
        if not joined:
            raise InputError(f"{source}: row {row} has no text", where=where, hint="remove it")
        found[key] = joined
    return found


def _relevant(
    table: Columns, queries: Mapping[str, str], documents: Mapping[str, str], fields: EmbeddingFields
) -> dict[str, dict[str, float]]:
    """Return the grades above 0 of each query's documents.

    Raises InputError for ids that there are not, and for a document with two grades for one query.
    """
    source, where = str(fields.relevances), "task.relevances"

    def column(what: str) -> Sequence[Any]:
        name = next((name for name in IDS[what] if name in table), None)
        return need_column(table, name or IDS[what][0], "relevances", source)

    grades: Sequence[Any] = [1.0] * len(column("query"))
    if any(name in table for name in IDS["grade"]):
        grades = column("grade")
    found: dict[str, dict[str, float]] = {key: {} for key in queries}
    given: dict[tuple[str, str], float] = {}
    for row, (query, document, value) in enumerate(zip(column("query"), column("document"), grades, strict=True), 1):
        query, document = str(query), str(document)
        for key, known, file in ((query, queries, "queries"), (document, documents, "corpus")):
            if key not in known:
                raise InputError(
                    f"{source}: row {row} names {cut(repr(key))}, which {getattr(fields, file) or 'the queries'} "
                    "does not have",
                    where=where,
                )
        grade = number_of(value, f"{source}: row {row}: the relevance", where)
        if grade < 0:
            raise InputError(f"{source}: row {row}: the relevance {grade:g} is below 0", where=where)
        if (before := given.setdefault((query, document), grade)) != grade:
            raise InputError(
                f"{source}: row {row} says {grade:g} of {cut(repr(document))} for {cut(repr(query))}, and a row before "
                f"it says {before:g}",
                where=where,
                hint="remove one of them",
            )
        if grade > 0:
            found[query][document] = grade
    return found


def _encoded(
    rows: "Dataset", batches: Iterator[dict[str, list[Any]]], processor: Any, max_length: int
) -> "Iterator[pa.RecordBatch]":
    import pyarrow as pa

    from kdcli.models.sentence_folder import longest_text, prompt_of
    from kdcli.tasks.encode import token_columns

    longest, position = longest_text(processor, max_length), 0
    prompts = {role: prompt_of(processor, role) for role in (None, "query", "document")}
    for batch in batches:
        count = len(batch["text"])
        roles: list[str | None] = [None] * count
        if "is_query" in batch:
            roles = ["query" if query else "document" for query in batch["is_query"]]
        index: list[int] = batch["index"]
        texts = [prompts[role] + text for role, text in zip(roles, batch["text"], strict=True)]
        extra = {}
        if "text_pair" in batch:
            second = [prompts[None] + text for text in batch["text_pair"]]
            texts = [text for pair in zip(texts, second, strict=True) for text in pair]
            index = [2 * number + place for number in index for place in range(2)]
            extra = {"row": pa.array([position + i // 2 for i in range(2 * count)], pa.int64())}
        position += count
        yield pa.RecordBatch.from_pydict(
            {"index": pa.array(index, pa.int64()), **extra, **token_columns(processor, texts, max_length=longest)}
        )
