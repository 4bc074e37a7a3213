"""The tables of further kinds of tasks: questions, tags of words, sentence embeddings, several languages.

Rows are the same methods everywhere, each plain and with OPDF; students have 3 of the teacher's 6 blocks, or low-rank
factors of as many parameters. The teacher of a task is fine-tuned once on the rows that its students get, but for
sentence embeddings, whose teacher is used as it is.

Sizes (a CPU only): small parts of the training and validation sets, chosen so that all cells take about an hour of one
core per seed; they say how methods compare with this little training, and nothing about a task's published figures.
"""

import os

from cells import Profile, Row, Size, Study

QUESTIONS, TAGS = "Questions, answered from a context", "Tags of words"
SENTENCES, LANGUAGES = "Sentence embeddings, from text alone", "Tweets in eight languages, as parts of one task"
OTHERS = "Methods that take factorised training, on tags of words"
METHODS = ("kd", "hs", "minilmv2", "tinybert", "makd")
METRICS = {
    "squad_small": "SQuAD, part, F1",
    "squad_v2_small": "SQuAD 2.0, part, F1",
    "xquad_en": "XQuAD English, F1",
    "wnut_17": "WNUT-17, span F1",
    "conll2000": "CoNLL-2000, span F1",
    "ud_en": "UD English, accuracy",
    "ud_de": "UD German, accuracy",
    "ud_es": "UD Spanish, accuracy",
    "sentences": "STS-B, Spearman",
    "tweets": "mean of the languages' F1",
}
GROUPS = {
    QUESTIONS: ("squad_small", "squad_v2_small", "xquad_en"),
    TAGS: ("wnut_17", "conll2000", "ud_en", "ud_de", "ud_es"),
    SENTENCES: ("sentences",),
    LANGUAGES: ("tweets",),
    OTHERS: ("conll2000",),
}
ENTITIES = ("corporation", "creative-work", "group", "location", "person", "product")
CHUNKS = ("ADJP", "ADVP", "CONJP", "INTJ", "LST", "NP", "PP", "PRT", "SBAR", "UCP", "VP")


def _span_tags(types: tuple[str, ...]) -> str:
    names = ("O", *(f"{letter}-{kind}" for kind in types for letter in "BI"))
    return ", ".join(f'"{name}"' for name in names)


def _rows(table: str, with_chains: bool) -> list[Row]:
    label, chains = (" +OPDF, L = 1", ("overparam.length=1",)) if with_chains else ("", ())
    if table == OTHERS:
        return [Row(table, f"`{name}`{label}", name, chains) for name in ("theseus", "adkd", "lgtm")]
    students = {"makd": ("student.budget=0.5", "student.init_samples=64")}
    rows = [
        Row(table, f"`{name}`{label}", name, students.get(name, ("student.layers=3",)) + chains) for name in METHODS
    ]
    if table == SENTENCES:
        rows.append(Row(table, f"`embedding`{label}", "kd", ('method="embedding"', "student.layers=3", *chains)))
    return rows


DATA = os.environ.get("KDCLI_DATA_DIR", "data")
PARTS = ("arabic", "english", "french", "german", "hindi", "italian", "portuguese", "spanish")


def _files(folder: str) -> str:
    return f'train="{DATA}/{folder}/train.parquet", validation="{DATA}/{folder}/validation.parquet"'


def _questions(name: str) -> Size:
    table = f'{{name="{name}", {_files(name)}, type="question-answering", stride=48, validation_samples=150}}'
    return Size(640, 8, 1, 2, ("task.max_length=192", "teacher.finetune.batch_size=8"), table)


def _tags(name: str, folder: str, fields: str, rows: int = 320) -> Size:
    table = f'{{name="{name}", {_files(folder)}, type="token-classification", validation_samples=200, {fields}}}'
    return Size(rows, 16, 2, 4, ("task.max_length=64", "teacher.finetune.batch_size=16"), table)


def _sentences() -> Size:
    text = f'data="{DATA}/lm/brown/train.parquet", pairs="stsb", validation_fraction=0.01'
    table = f'{{name="sentences", type="sentence-embedding", {text}}}'
    return Size(3_200, 32, 1, 0, ("task.max_length=48", "teacher.finetune=false"), table)


def _tweets() -> Size:
    parts = ", ".join(f'{{name="{name}", {_files(f"tweet_sentiment/{name}")}}}' for name in PARTS)
    table = f'{{name="tweets", text="text", metrics=["f1", "accuracy"], validation_samples=120, part=[{parts}]}}'
    # With twice these rates the teacher learns nothing.
    rates = ("teacher.finetune.learning_rate=1e-4", "train.learning_rate=1e-4")
    return Size(2_560, 32, 1, 5, ("task.max_length=40", "teacher.finetune.batch_size=32", *rates), table)


CPU = Profile(
    {
        **{name: _questions(name) for name in GROUPS[QUESTIONS]},
        "wnut_17": _tags("wnut_17", "wnut_17", f"labels=[{_span_tags(ENTITIES)}]", rows=640),
        # The validation rows have a tag that the training rows have not.
        "conll2000": _tags("conll2000", "conll2000", f'label="chunk_tags", labels=[{_span_tags(CHUNKS)}]'),
        **{f"ud_{name}": _tags(f"ud_{name}", f"ud_pos/{name}", 'label="pos"') for name in ("en", "de", "es")},
        "sentences": _sentences(),
        "tweets": _tweets(),
    },
    (
        'train.select="last"',
        "train.eval_every=100000",
        "train.learning_rate=3e-4",
        'train.device="cpu"',
        "teacher.seed=42",
        "teacher.finetune.learning_rate=2e-4",
    ),
    GROUPS,
)
STAGES = tuple(tuple(row for table in GROUPS for row in _rows(table, chains)) for chains in (False, True))
KINDS = Study(
    STAGES,
    METRICS,
    # Questions and tweets take the longest.
    (
        "conll2000",
        "sentences",
        "ud_en",
        "ud_de",
        "ud_es",
        "wnut_17",
        "squad_small",
        "xquad_en",
        "squad_v2_small",
        "tweets",
    ),
    {table: next(row for row in STAGES[0] if row.table == (TAGS if table == OTHERS else table)) for table in GROUPS},
    CPU,
    seeds=2,
    seeds_last=True,
)
