"""What a recipe may say: one pydantic model a TOML table.

Only what can be checked without data and models is checked here. A method's own options are checked by the
method (`kdcli.methods`), and what needs a model's shape is checked when the plan is made.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from kdcli.errors import cut
from kdcli.names import Name, same_folder

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]

# Upper limits are far above all use: they keep a slip of the keyboard from filling the memory, or from taking hours.
PositiveInt = Annotated[int, Field(gt=0, le=1_000_000_000)]
NonNegativeInt = Annotated[int, Field(ge=0, le=1_000_000_000)]
PositiveFloat = Annotated[float, Field(gt=0.0, le=1e6)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, le=1e6)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Blocks = Annotated[int, Field(gt=0, le=256)]
Heads = Annotated[int, Field(gt=0, le=1024)]
Width = Annotated[int, Field(gt=0, le=65_536)]
Words = Annotated[int, Field(gt=0, le=1_000_000)]
Tokens = Annotated[int, Field(gt=0, le=1_000_000)]
BatchSize = Annotated[int, Field(gt=0, le=65_536)]
Times = Annotated[int, Field(gt=0, le=1000)]

SCRATCH_PARAMETERS = 1_000_000_000
PARAMETERS = 10**12


class Section(BaseModel):
    """Base of all tables: unknown keys and wrong types are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class FinetuneSection(Section):
    """`[teacher.finetune]`: how a base model becomes the teacher; in `[task.augment]`, a masked language model."""

    epochs: PositiveFloat = 3.0
    max_steps: PositiveInt | None = None
    learning_rate: PositiveFloat = 5e-5
    batch_size: BatchSize = 32
    warmup: Share = 0.1
    weight_decay: NonNegativeFloat = 0.01


class AugmentSection(Section):
    """`[task.augment]`: further training rows, in which a masked language model replaced words.

    copies: of every row. probability: that a word of a copy is replaced. top_k: how many of the model's words a
    replacement is drawn from. Defaults are TinyBERT's. text, finetune: plain text, a file or a folder, on which a
    model without a masked-LM head is given one, and how.
    """

    model: str
    text: str | None = None
    finetune: FinetuneSection | None = None
    copies: Times = 20
    probability: Fraction = 0.4
    top_k: Words = 15
    batch_size: BatchSize = 64


def parse_delimiter(text: str) -> str:
    r"""Return the character that stands between two columns of a CSV file; `\t` and `tab` are the tab.

    Raises ValueError for what cannot.
    """
    text = {"\\t": "\t", "tab": "\t"}.get(text, text)
    if len(text) != 1 or text in '"\r\n\0' or text.isalnum():
        raise ValueError(f"{text!r} cannot stand between two columns; use one character, such as ; or \\t")
    return text


def parse_encoding(text: str) -> str:
    """Return the name of an encoding of text, as given. Raises ValueError for an unknown one."""
    try:
        "".encode(text)
    except (LookupError, ValueError):
        raise ValueError(
            f"{text!r} is no encoding of text; use utf-8, latin-1, cp1252 or utf-16, or Python's others"
        ) from None
    return text


class TaskSection(Section):
    """`[task]`: a GLUE name, the built-in `reviews` task, the user's own data, or plain text.

    labels: the classes in order; where the data has integers from 0 instead, they count these. delimiter, encoding:
    of files of text (CSV, TSV, JSON, .txt), found out and UTF-8 where left out. validation_samples, test_samples: how
    many rows of either set are used, drawn at random; None uses all.
    """

    name: Name
    type: Literal["classification", "regression", "text"] | None = None
    data: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    hub: str | None = None
    hub_config: str | None = None
    text: str | list[str] | None = None
    label: str | None = None
    labels: list[str] | None = None
    delimiter: str | None = None
    encoding: str | None = None
    validation_fraction: Fraction = 0.1
    split_seed: Seed = 0
    metrics: list[str] | None = None
    max_length: Tokens = 128
    train_samples: PositiveInt | None = None
    validation_samples: PositiveInt | None = None
    test_samples: PositiveInt | None = None
    mask_probability: Fraction = 0.15
    mask_smoothing: NonNegativeFloat = 0.0
    augment: AugmentSection | None = None

    _delimiter = field_validator("delimiter")(lambda text: text if text is None else parse_delimiter(text))
    _encoding = field_validator("encoding")(lambda text: text if text is None else parse_encoding(text))

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = [key for key in ("data", "train", "hub") if getattr(self, key) is not None]
        if len(sources) > 1:
            raise ValueError(f"give one of data, train and hub, not {' and '.join(sources)}")
        if (self.validation or self.test) and self.train is None:
            raise ValueError("validation and test files need a train file")
        if (self.delimiter or self.encoding) and not (
            self.data or self.train or (self.type == "text" and not self.hub)
        ):
            raise ValueError("delimiter and encoding are of own files: data or train")
        if self.type == "text":
            with_labels = ("label", "labels", "metrics", "test", "test_samples")
            unsupported = [key for key in with_labels if getattr(self, key) is not None]
            if self.augment is not None:
                unsupported.append("augment")
            if unsupported:
                raise ValueError(f'type = "text" has no {", ".join(unsupported)}')
            if isinstance(self.text, list) and len(self.text) != 1:
                raise ValueError("plain text takes one text column")
            return self
        if sources and self.text is None:
            raise ValueError('own data needs text = "COLUMN" (or two columns)')
        if isinstance(self.text, list) and len(self.text) not in (1, 2):
            raise ValueError("text takes one or two columns")
        if not sources and self.text is not None:
            raise ValueError("text = ... needs data, train or hub")
        return self

    @property
    def is_custom(self) -> bool:
        """True when the task is the user's own data with labels."""
        return self.type != "text" and any((self.data, self.train, self.hub))


class ScratchSection(Section):
    """`[teacher.scratch]`: a new, randomly initialised teacher with a tokenizer trained on the task's text."""

    family: str = "bert"
    layers: Blocks = 4
    hidden_size: Width = 128
    heads: Heads = 4
    intermediate_size: Width = 512
    vocab_size: Words = 4096

    @model_validator(mode="after")
    def _fits_memory(self) -> Self:
        block = 4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size
        parameters = self.layers * block + self.vocab_size * self.hidden_size
        if parameters > SCRATCH_PARAMETERS:
            raise ValueError(
                f"these sizes make a model of {parameters / 1e9:,.1f} billion parameters; at most "
                f"{SCRATCH_PARAMETERS / 1e9:g} billion are made from scratch"
            )
        return self


class DownstreamSection(FinetuneSection):
    """`[[finetune]]`: a task that the general student is fine-tuned and scored on, after distilling on plain text.

    seeds: how many runs the score is the mean of. against: what is fine-tuned in the same way, to compare with:
    the same architecture from random weights ("scratch"), and the teacher ("teacher").
    """

    task: TaskSection
    seeds: Times = 1
    against: list[Literal["scratch", "teacher"]] = []

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("task"), str):
            data = {**data, "task": {"name": data["task"]}}
        return data

    @model_validator(mode="after")
    def _labelled(self) -> Self:
        if self.task.type == "text":
            raise ValueError("a model is fine-tuned on a task with labels, not on plain text")
        if self.task.augment is not None:
            raise ValueError("[[finetune]] has no augment: copies are for a student that learns from a teacher")
        return self


class TeacherSection(Section):
    """`[teacher]`: the model to copy from: a hub name, a folder, or one made on the spot.

    seed: of its making and fine-tuning, where that is another than the recipe's: students of several seeds can
    then share one teacher.
    """

    model: str | None = None
    revision: str | None = None
    tokenizer: str | None = None
    labels: list[str] | None = None
    trust_remote_code: bool = False
    cache: bool = True
    seed: Seed | None = None
    finetune: FinetuneSection | bool | None = None
    scratch: ScratchSection | None = None
    black_box: bool = False

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if sum((self.model is not None, self.scratch is not None, self.black_box)) != 1:
            raise ValueError(
                "give teacher.model (a hub name or a folder), [teacher.scratch] or black_box = true, one of them"
            )
        if self.black_box and self.finetune not in (None, False):
            raise ValueError("a black box cannot be fine-tuned")
        if self.scratch is not None and self.finetune is False:
            raise ValueError("a teacher from scratch must be trained: finetune = false makes no sense")
        return self


Form = Literal["depth", "low-rank", "width", "checkpoint"]

FORM_FIELDS: dict[Form, tuple[str, ...]] = {
    "depth": ("layers", "select", "init"),
    "low-rank": ("budget", "rank", "params", "energy", "embedding_rank"),
    "width": ("hidden_size", "intermediate_size", "heads", "layers", "init"),
    "checkpoint": ("model",),
}
"""The fields of `[student]` that each form has."""


class StudentSection(Section):
    """`[student]`: the form of the smaller model."""

    form: Form | None = None
    # depth
    layers: Blocks | list[NonNegativeInt] | None = None
    select: Literal["even", "spread", "first", "last"] = "even"
    # low-rank
    budget: Fraction | None = None
    rank: Width | None = None
    params: Annotated[int, Field(gt=0, le=PARAMETERS)] | str | None = None
    energy: Fraction | None = None
    embedding_rank: Width | None = None
    # width
    hidden_size: Width | None = None
    intermediate_size: Width | None = None
    heads: Heads | None = None
    init: Literal["teacher", "sliced", "random"] = "teacher"
    # checkpoint
    model: str | None = None
    # all forms
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @field_validator("params")
    @classmethod
    def _params(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, str):
            parse_count(value)
        return value

    @model_validator(mode="after")
    def _fits_form(self) -> Self:
        if self.form is not None:
            unsupported = self.unsupported_fields(self.form)
            if unsupported:
                raise ValueError(f'form = "{self.form}" has no {", ".join(unsupported)}')
        sizes = [k for k in ("budget", "rank", "params", "energy") if getattr(self, k) is not None]
        if len(sizes) > 1:
            raise ValueError(f"give one of budget, rank, params and energy, not {' and '.join(sizes)}")
        if self.form == "checkpoint" and self.model is None:
            raise ValueError('form = "checkpoint" needs model = "FOLDER OR HUB NAME"')
        return self

    def unsupported_fields(self, form: Form) -> list[str]:
        """Return the fields with another value than their default that this form does not have."""
        others = dict.fromkeys(key for keys in FORM_FIELDS.values() for key in keys if key not in FORM_FIELDS[form])
        return [key for key in others if getattr(self, key) != type(self).model_fields[key].default]


def parse_count(text: int | str) -> int:
    """Return the whole number that `14.5M`, `800k`, `1_000` or an int says.

    Raises ValueError for anything else.
    """
    if isinstance(text, int):
        return text
    units = {"k": 1e3, "m": 1e6, "b": 1e9}
    body, unit = (text[:-1], units[text[-1].lower()]) if text[-1:].lower() in units else (text, 1.0)
    try:
        value = round(float(body) * unit)
    except (ValueError, OverflowError):
        raise ValueError(f"{cut(text)!r} is no parameter count; write 14.5M, 800k or 14500000") from None
    if not 0 < value <= PARAMETERS:
        raise ValueError(f"a parameter count must be above 0 and at most {PARAMETERS:,}")
    return value


class MethodSection(BaseModel):
    """`method = "makd"` or a `[method]` table: the name, and the method's own options beside it."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    name: str

    @property
    def options(self) -> dict[str, Any]:
        """The options as written; the method's own schema checks them."""
        return dict(self.__pydantic_extra__ or {})


class OverparamSection(Section):
    """`[overparam]`: chains of tensors in place of the student's block matrices while it trains (OPDF)."""

    factorization: Literal["mpo", "svd", "svd-plain"] = "mpo"
    length: Annotated[int, Field(ge=0, le=32)] = 3
    scale: Annotated[float, Field(gt=1.0, le=1000.0)] | None = None
    factors: dict[str, list[PositiveInt]] | None = None
    targets: list[Literal["attention", "ffn"]] = ["attention", "ffn"]
    layers: list[NonNegativeInt] | None = None
    aux_weight: NonNegativeFloat = 1.0
    aux_reduction: Literal["mean", "sum"] = "mean"
    aux_mismatch: Literal["skip", "truncate"] = "skip"
    gauge: Literal["symmetric", "left"] = "symmetric"
    svd_dtype: Literal["float32", "float64"] = "float64"
    learning_rate: PositiveFloat | None = None


class TrainSection(Section):
    """`[train]`: the loop. What is None takes the method's default."""

    epochs: PositiveFloat | None = None
    max_steps: PositiveInt | None = None
    batch_size: BatchSize = 32
    gradient_accumulation: BatchSize = 1
    learning_rate: PositiveFloat | None = None
    scheduler: Literal["linear", "cosine", "constant"] | None = None
    warmup: Share | None = None
    weight_decay: NonNegativeFloat | None = None
    max_grad_norm: PositiveFloat = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    group_by_length: bool = True
    eval_every: PositiveInt | None = None
    patience: PositiveInt | None = None
    select: Literal["best", "last"] = "best"
    log_every: PositiveInt | None = None
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    keep_checkpoints: bool = False

    @model_validator(mode="after")
    def _whole_parts(self) -> Self:
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be split over {self.gradient_accumulation} accumulation steps; "
                f"use a multiple of {self.gradient_accumulation}"
            )
        return self


class EvaluateSection(Section):
    """`[evaluate]`: how the student is scored, and the gates on its score and on its share of the teacher's."""

    protocol: Literal["dev", "half-dev"] = "dev"
    batch_size: BatchSize = 64
    fail_under: float | None = None
    fail_under_retention: float | None = None


class ExportSection(Section):
    """`[export]`: the ONNX file and its latency grid; `onnx = true` exports at the end of the run."""

    onnx: bool = False
    opset: Annotated[int, Field(ge=20, le=23)] = 23
    batch_sizes: list[BatchSize] = [1, 8]
    sequence_lengths: list[Tokens] = [16, 128]
    threads: Times | None = None
    runs: PositiveInt | None = None


class Recipe(Section):
    """A whole recipe. `task`, `method` and `teacher.model` are enough; everything else has a default."""

    task: TaskSection
    method: MethodSection
    teacher: TeacherSection
    name: Name | None = None
    student: StudentSection = StudentSection()
    assistant: StudentSection | None = None
    overparam: OverparamSection | None = None
    train: TrainSection = TrainSection()
    evaluate: EvaluateSection = EvaluateSection()
    export: ExportSection = ExportSection()
    finetune: list[DownstreamSection] = []
    seed: Seed = 42
    output: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, data: Any) -> Any:
        if isinstance(data, dict):
            data = dict(data)
            for key in ("task", "method"):
                if isinstance(data.get(key), str):
                    data[key] = {"name": data[key]}
        return data

    @field_validator("finetune")
    @classmethod
    def _own_folders(cls, value: list[DownstreamSection]) -> list[DownstreamSection]:
        names = [same_folder(section.task.name) for section in value]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise ValueError(
                    f"finetune[{names.index(name)}] and finetune[{number}] are both called "
                    f'"{value[number].task.name}", and each has a folder of that name; give one another task.name'
                )
        return value

    @model_validator(mode="after")
    def _text_or_labels(self) -> Self:
        if self.finetune and self.task.type != "text":
            raise ValueError('[[finetune]] follows distilling on plain text: [task] type = "text"')
        if self.task.type == "text":
            for field in ("fail_under", "fail_under_retention"):
                if getattr(self.evaluate, field) is not None:
                    raise ValueError(f"evaluate.{field} needs a task with labels; plain text has no score")
            if self.export.onnx:
                raise ValueError(
                    "export.onnx needs a task with labels: a general student is fine-tuned first, and then exported "
                    "with `kdcli export`"
                )
        if self.teacher.black_box and self.evaluate.fail_under_retention is not None:
            raise ValueError("evaluate.fail_under_retention needs a teacher with a score; a black box has none")
        return self
