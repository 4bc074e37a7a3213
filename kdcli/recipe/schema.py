"""What a recipe may say: one pydantic model a TOML table.

Only what can be checked without data and models is checked here. A method's own options are checked by the
method (`kdcli.methods`), and what needs a model's shape is checked when the plan is made.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from kdcli.errors import cut
from kdcli.names import Name, same_folder
from kdcli.recipe.fields import Named

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]

# Upper limits are far above all use: they keep a typing error from filling the memory, or from taking hours.
PositiveInt = Annotated[int, Field(gt=0, le=1_000_000_000)]
NonNegativeInt = Annotated[int, Field(ge=0, le=1_000_000_000)]
PositiveFloat = Annotated[float, Field(gt=0.0, le=1e6)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, le=1e6)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Blocks = Annotated[int, Field(gt=0, le=256)]
Heads = Annotated[int, Field(gt=0, le=1024)]
Width = Annotated[int, Field(gt=0, le=65_536)]
Words = Annotated[int, Field(gt=0, le=1_000_000)]
Pixels = Annotated[int, Field(gt=0, le=4_096)]
Tokens = Annotated[int, Field(gt=0, le=1_000_000)]
BatchSize = Annotated[int, Field(gt=0, le=65_536)]
Times = Annotated[int, Field(gt=0, le=1000)]
Betas = Annotated[list[Annotated[float, Field(ge=0.0, lt=1.0)]], Field(min_length=2, max_length=2)]
Epsilon = Annotated[float, Field(gt=0.0, le=1.0)]

SCRATCH_PARAMETERS = 1_000_000_000
PARAMETERS = 10**12


class Section(BaseModel):
    """Base of all tables: unknown keys and wrong types are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class FinetuneSection(Section):
    """How a model is trained on gold answers: a teacher, a masked language model of `[task.augment]`, a student."""

    epochs: PositiveFloat = Field(default=3.0, description="Passes over the training rows.")
    max_steps: PositiveInt | None = Field(
        default=None, description="Optimizer steps, instead of epochs. Left out, they follow from the epochs."
    )
    learning_rate: PositiveFloat = Field(
        default=5e-5,
        description="The highest learning rate of AdamW; it rises during the warm-up and then falls linearly to 0.",
    )
    batch_size: BatchSize = Field(default=32, description="Examples of one optimizer step.")
    warmup: Share = Field(default=0.1, description="Share of the steps in which the learning rate rises from 0.")
    weight_decay: NonNegativeFloat = Field(
        default=0.01, description="AdamW's weight decay of matrices; biases and layer norms have none."
    )


class TeacherFinetuneSection(FinetuneSection):
    """`[teacher.finetune]`: how a base model becomes the teacher."""

    head_only: bool = Field(
        default=False,
        description="Train the head alone, on what the base model makes of the rows (a linear probe, where the head is "
        "one layer): its own weights stay as they are, and nothing in it is dropped out.",
    )


class AugmentSection(Section):
    """`[task.augment]`: copies of training rows for the student, in which a masked language model replaced words."""

    model: str = Field(description="The masked language model that proposes words: a hub name or a folder.")
    text: str | None = Field(
        default=None,
        description="Plain text, a file or a folder, on which a model without a masked-LM head is fine-tuned first. "
        "Left out, the model must have that head.",
    )
    finetune: FinetuneSection | None = Field(
        default=None, description="How that fine-tuning runs. Left out, with the defaults of the table."
    )
    copies: Times = Field(
        default=20, description="Copies of every training row; of a pair of texts one changes in each copy, in turn."
    )
    stop_words: list[str] | None = Field(
        default=None,
        description='Words that are never replaced, whatever their case. Left out, those of English, such as "the", '
        '"is" and "not"; [] replaces all words.',
    )
    probability: Fraction = Field(default=0.4, description="Probability that a word of a copy is replaced.")
    top_k: Words = Field(
        default=15, description="A replacement is drawn from this many of the model's most likely words."
    )
    batch_size: BatchSize = Field(default=64, description="Masked sentences in one forward pass of the model.")


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


SOURCES = ("data", "train", "hub")
"""The fields of `[task]` that say where rows of one's own come from."""


class PartSection(Section):
    """`[[task.part]]`: one of several sets of rows that make up a task, such as a language.

    Beside these fields stand names of columns, where they differ from those in `[task]`.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    name: Name = Field(
        description="What the part is called, such as german; its scores have that name. Without rows of its own, the "
        "name of a set that kdcli knows."
    )
    data: str | None = Field(
        default=None,
        description="One file with all rows of the part, as in [task]. Left out, the rows come from train, hub or a "
        "known set.",
    )
    train: str | None = Field(
        default=None,
        description="The file of its training rows. Left out, the rows come from data, hub or a known set.",
    )
    validation: str | None = Field(
        default=None, description="The file of its validation rows, beside `train`. Left out, a part is held out."
    )
    test: str | None = Field(
        default=None, description="The file of its test rows, beside `train`. Left out, the validation rows are scored."
    )
    hub: str | None = Field(
        default=None,
        description="A data set on the Hugging Face hub. Left out, the rows come from data, train or a known set.",
    )
    hub_config: str | None = Field(
        default=None, description="The configuration of the hub's data set. Left out, its default one."
    )
    delimiter: str | None = Field(
        default=None, description="The character between two columns of its CSV files. Left out, that of [task]."
    )
    encoding: str | None = Field(default=None, description="The encoding of its text files. Left out, that of [task].")

    @property
    def is_own(self) -> bool:
        """True when the rows are the user's own."""
        return any(getattr(self, name, None) for name in SOURCES)

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the kind as written."""
        return dict(self.__pydantic_extra__ or {})


class TaskSection(Named, Section):
    """`[task]`, or `task = "NAME"`: a set that is known by its name, or the user's own data.

    Beside these fields stand those of its kind, which has a schema of its own for them (`kdcli tasks` lists both).
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    name: Name = Field(
        description="The task: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, squad, squad_v2, dolly, alpaca, "
        "reviews, shapes, or a name of your own. GLUE is read from $KDCLI_DATA_DIR/glue/NAME/*.parquet where that "
        "exists, else from nyu-mll/glue on the hub."
    )
    type: str | None = Field(
        default=None,
        description='The kind of task, one of those that `kdcli tasks` lists; "text" is plain text, which makes a '
        "general student. Left out, it follows from the labels.",
    )
    data: str | None = Field(
        default=None,
        description="One file with all rows: CSV, TSV, JSON, JSONL or Parquet; for plain text also a .txt file or a "
        "folder. Give this, train or hub for data of your own.",
    )
    train: str | None = Field(default=None, description="The file of the training rows, in place of `data`.")
    validation: str | None = Field(
        default=None,
        description="The file of the validation rows, beside `train`. Left out, a part of the training rows is held "
        "out.",
    )
    test: str | Annotated[dict[Name, str], Field(min_length=1)] | None = Field(
        default=None,
        description="The file of the test rows, beside `train`; or several by name, such as { own = FILE, other = FILE "
        "}, each with a score of its own. They are scored at the end and choose nothing.",
    )
    hub: str | None = Field(
        default=None,
        description="A data set on the Hugging Face hub, in place of `data`; its splits train, validation and test "
        "are used.",
    )
    hub_config: str | None = Field(
        default=None, description="The configuration of the hub's data set. Left out, its default one."
    )
    delimiter: str | None = Field(
        default=None,
        description='The character between two columns of a CSV file, such as ";" or "\\t". Left out, it is found out.',
    )
    encoding: str | None = Field(
        default=None, description='The encoding of text files, such as "latin-1" or "utf-16". Left out, UTF-8.'
    )
    validation_fraction: Fraction = Field(
        default=0.1, description="Share of the training rows that is held out where there is no validation set."
    )
    split_seed: Seed = Field(default=0, description="Seed of the held-out part and of the drawn samples.")
    metrics: list[str] | None = Field(
        default=None,
        description="Metrics to report, of those that `kdcli tasks` lists for the type; the first one chooses the "
        "checkpoint and is gated. Left out, the usual ones of the task.",
    )
    max_length: Tokens = Field(
        default=128, description="Longest input in tokens, special tokens included; longer texts are cut."
    )
    train_samples: PositiveInt | None = Field(
        default=None, description="Use this many training rows, drawn at random. Left out, all."
    )
    validation_samples: PositiveInt | None = Field(
        default=None, description="Use this many validation rows, drawn at random. Left out, all."
    )
    test_samples: PositiveInt | None = Field(
        default=None, description="Use this many test rows, drawn at random. Left out, all."
    )
    part: Annotated[list[PartSection], Field(min_length=1, max_length=1000)] | None = Field(
        default=None,
        description="Several sets of rows, such as one a language, in place of `data`: each has its own scores, and "
        "their mean chooses the checkpoint and is gated. A part may name its columns where they differ from those in "
        "[task]. `train_samples` are those of all parts together, which keep their shares; other samples are those of "
        "each part. Left out, the task is one set.",
    )
    mixing_temperature: Annotated[float, Field(ge=1.0, le=1e6)] | None = Field(
        default=None,
        description="How much small parts are trained on: of n examples, in proportion to n^(1 / this). 1 takes each "
        "row once an epoch; XLM-R's exponent alpha = 0.3 is 3.33, that of multilingual BERT, 0.7, is 1.43; 1e6 takes "
        "all parts alike. Left out, 1.",
    )
    augment: AugmentSection | None = Field(
        default=None,
        description="More training rows for the student, where answers stay when a word changes: not for spans of a "
        "context. Left out, none.",
    )

    @field_validator("part")
    @classmethod
    def _own_names(cls, value: list[PartSection] | None) -> list[PartSection] | None:
        names = [same_folder(part.name) for part in value or ()]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise ValueError(
                    f"part[{names.index(name)}] and part[{number}] have one name; give one of them another"
                )
        return value

    _delimiter = field_validator("delimiter")(lambda text: text if text is None else parse_delimiter(text))
    _encoding = field_validator("encoding")(lambda text: text if text is None else parse_encoding(text))

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = [key for key in SOURCES if getattr(self, key) is not None]
        if self.part is not None:
            _check_parts(self)
        elif self.mixing_temperature is not None:
            raise ValueError("mixing_temperature needs parts: [[task.part]] tables")
        if len(sources) > 1:
            raise ValueError(f"give one of data, train and hub, not {' and '.join(sources)}")
        if (self.validation or self.test) and self.train is None:
            raise ValueError("validation and test files need a train file")
        if (self.delimiter or self.encoding) and (self.hub or (self.type is None and not self.is_own)):
            raise ValueError("delimiter and encoding are of own files: data or train")
        return self

    @property
    def is_own(self) -> bool:
        """True when the rows are the user's own."""
        return any((self.data, self.train, self.hub, self.part))

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the kind as written; its own schema checks them."""
        return dict(self.__pydantic_extra__ or {})


def _check_parts(task: TaskSection) -> None:
    """Raise ValueError where `[task]` says what its parts say."""
    given = [key for key in (*SOURCES, "validation", "test", "hub_config") if getattr(task, key) is not None]
    if given:
        raise ValueError(f"the rows are those of its parts: {given[0]} belongs into a [[task.part]]")


class ScratchSection(Section):
    """`[teacher.scratch]`: a new, randomly initialised teacher.

    One that reads texts gets a tokenizer trained on the task's, one that reads images a processor for their size.
    """

    family: str = Field(
        default="bert", description="The model family, such as bert or roberta; `kdcli families` lists all."
    )
    layers: Blocks = Field(default=4, description="Number of transformer blocks.")
    hidden_size: Width = Field(default=128, description="Width of the hidden states.")
    heads: Heads = Field(default=4, description="Attention heads; their number divides hidden_size.")
    intermediate_size: Width = Field(default=512, description="Width of the feed-forward layer.")
    vocab_size: Words = Field(
        default=4096,
        description="Most tokens of the tokenizer that is made from the task's text; only of a family that reads text.",
    )
    image_size: Pixels = Field(
        default=32,
        description="Height and width in pixels that images are brought to; only of a family that reads images.",
    )
    patch_size: Pixels | None = Field(
        default=None,
        description="Height and width in pixels of the patches that are a model's tokens; only of a family that reads "
        "images. It divides image_size. Left out, an eighth of image_size.",
    )

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

    @model_validator(mode="after")
    def _has_patches(self) -> Self:
        if self.image_size % self.patch:
            raise ValueError(f"patch_size {self.patch} does not divide image_size {self.image_size}")
        return self

    @property
    def patch(self) -> int:
        """Height and width of a patch in pixels."""
        return self.patch_size or max(1, self.image_size // 8)


class DownstreamSection(FinetuneSection):
    """`[[finetune]]`: a task that the general student is fine-tuned and scored on, after distilling on plain text."""

    task: TaskSection = Field(description="The task: a name, or a table like [task].")
    seeds: Times = Field(
        default=1, description="Runs, with seeds from the recipe's upwards, that the score is the mean of."
    )
    against: list[Literal["scratch", "teacher"]] = Field(
        default=[],
        description='What is fine-tuned in the same way, for comparison: "scratch" is the student\'s architecture with '
        'random weights, "teacher" is the teacher.',
    )

    @model_validator(mode="after")
    def _labelled(self) -> Self:
        if self.task.augment is not None:
            raise ValueError("[[finetune]] has no augment: copies are for a student that learns from a teacher")
        return self


class TeacherSection(Section):
    """`[teacher]`: the model to distil from: a hub name, a folder, one made on the spot, or a black box."""

    model: str | None = Field(
        default=None,
        description="The teacher: a hub name or a folder. Give this, [teacher.scratch] or black_box = true.",
    )
    revision: str | None = Field(
        default=None,
        description="Branch, tag or commit of the hub's model and of what it reads by. Left out, the newest.",
    )
    tokenizer: str | None = Field(
        default=None,
        description="Another tokenizer, or image processor of a model that reads images: a hub name or a folder. "
        "Left out, the model's own.",
    )
    labels: list[str] | None = Field(
        default=None,
        description="Names of the model's classes in its order, where it has no names or other ones than the task. "
        "Left out, the names in its configuration.",
    )
    trust_remote_code: bool = Field(default=False, description="Run model code that comes from the hub.")
    cache: bool | Literal["all"] = Field(
        default=True,
        description="Compute a fixed teacher's logits on the training rows once, and keep them on disk. "
        '"all": the hidden states, queries, keys, values and matrix outputs that the method compares, too, while the '
        "student trains; `kdcli distill --dry-run` tells the size.",
    )
    cache_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description='cache = "all": how states are kept: as computed, or rounded to half the size.'
    )
    dtype: Literal["auto", "bf16", "fp32"] = Field(
        default="auto",
        description='Number type of a fixed teacher\'s weights in memory; "auto" is bf16 for one that is stored in it, '
        "where the training computes in bf16, and else fp32. A teacher that is trained has fp32 weights.",
    )
    device_map: Literal["auto"] | dict[str, str] | None = Field(
        default=None,
        description="Spread a fixed teacher, block by block, over all GPUs of the machine and the CPU's memory: "
        '"auto", or the most memory that it may take of each, such as {"0" = "20GB", "1" = "70GB", cpu = "100GB"}. One '
        "process trains then. Left out, the teacher is where the student is.",
    )
    sharding: Literal["none", "fsdp"] = Field(
        default="none",
        description='What several processes do with a fixed teacher: "none" gives each a whole one, "fsdp" a part of '
        "each block, which is gathered while it runs.",
    )
    top_k: PositiveInt | None = Field(
        default=None,
        description="Next tokens: keep the teacher's so many most probable tokens at each position of the training "
        "text, and the probability of all others together, on disk, and compare the student with these alone: the "
        "teacher does not run beside it. What is cut off is measured and reported. Left out, it runs in each step.",
    )
    seed: Seed | None = Field(
        default=None,
        description="Seed of the teacher's making and fine-tuning, so that students of several seeds share one "
        "teacher. Left out, the recipe's seed.",
    )
    finetune: TeacherFinetuneSection | bool | None = Field(
        default=None,
        description="Fine-tune the teacher on the task first: true, false, or a table that says how. Left out, only a "
        "model without a trained head of the task's type is fine-tuned.",
    )
    scratch: ScratchSection | None = Field(
        default=None, description="A new teacher with random weights, in place of a model."
    )
    black_box: bool = Field(
        default=False,
        description="There is no model, only answers (labels): for the method dbkd and a student with form = "
        '"checkpoint".',
    )

    @field_validator("device_map")
    @classmethod
    def _limits(cls, value: Any) -> Any:
        for device, limit in value.items() if isinstance(value, dict) else ():
            if not (device.isdecimal() or device == "cpu"):
                raise ValueError(f'{device!r} is no device; write the number of a GPU ("0") or cpu')
            if not re.fullmatch(r"\d+(\.\d+)? ?[KMG]i?B", limit):
                raise ValueError(
                    f"{limit!r} is no size of memory; write a number of GB, MB, KB, GiB, MiB or KiB, as 20GB"
                )
        return value

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if sum((self.model is not None, self.scratch is not None, self.black_box)) != 1:
            raise ValueError(
                "give teacher.model (a hub name or a folder), [teacher.scratch] or black_box = true, one of them"
            )
        if self.cache_dtype != "fp32" and self.cache != "all":
            raise ValueError('cache_dtype is for the states that cache = "all" keeps')
        if self.device_map is not None and self.sharding != "none":
            raise ValueError("give device_map (the GPUs of one process) or sharding (over processes), one of them")
        if self.black_box and (self.device_map is not None or self.sharding != "none" or self.dtype != "auto"):
            raise ValueError("a black box has no weights: it has no dtype, device_map or sharding")
        if self.top_k is not None and not self.cache:
            raise ValueError("top_k keeps what the teacher says, and cache = false keeps nothing: give one of them")
        if self.top_k is not None and self.sharding != "none":
            raise ValueError("top_k is computed by one process, before sharding shares the teacher out: one of them")
        if self.cache == "all" and self.sharding != "none":
            raise ValueError('what cache = "all" keeps is computed by one process, and sharding needs all: one of them')
        if self.black_box and self.finetune not in (None, False):
            raise ValueError("a black box cannot be fine-tuned")
        if self.scratch is not None and self.finetune is False:
            raise ValueError("a teacher from scratch must be trained: finetune = false makes no sense")
        if self.scratch is not None and isinstance(self.finetune, TeacherFinetuneSection) and self.finetune.head_only:
            raise ValueError("a teacher from scratch must be trained whole: finetune.head_only = true makes no sense")
        return self


Form = Literal["depth", "low-rank", "width", "checkpoint"]

FORM_FIELDS: dict[Form, tuple[str, ...]] = {
    "depth": ("layers", "select", "init"),
    "low-rank": (
        "budget",
        "rank",
        "params",
        "energy",
        "embedding_rank",
        "ranks",
        "rank_multiple",
        "init",
        "init_samples",
        "sequential",
    ),
    "width": ("hidden_size", "intermediate_size", "heads", "kv_heads", "layers", "init", "init_samples", "alignment"),
    "checkpoint": ("model", "layers", "select", "init"),
}
"""The fields of `[student]` that each form has."""

STARTS: dict[Form, tuple[str, ...]] = {
    "depth": ("teacher", "random"),
    "low-rank": ("svd", "activations", "gradients", "both"),
    "width": ("teacher", "random", "projections"),
    "checkpoint": ("random",),
}
"""The values of `init` that each form has."""


class VocabularySection(Section):
    """`[student.vocabulary]`: the student has only the pieces of the teacher's vocabulary that text uses."""

    text: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Files (.txt with a text a line, CSV, JSON lines, Parquet), folders of such files, and hub sets "
        "whose pieces stay. Left out, the task's training text, with that of [[finetune]].",
    )
    columns: list[str] | None = Field(
        default=None, min_length=1, description="Columns of the tables that text names. Left out, text."
    )
    keep: Annotated[int, Field(gt=0, le=PARAMETERS)] | None = Field(
        default=None, description="The most pieces, those that the text uses most. Left out, all that it uses."
    )
    min_count: Annotated[int, Field(ge=1, le=1_000_000_000)] = Field(
        default=1, description="How often the text must use a piece that stays."
    )
    characters: bool = Field(
        default=True,
        description="Whether a piece stays for each character of the used ones, so that no new word of these "
        "characters is unknown.",
    )

    @model_validator(mode="after")
    def _columns_of_text(self) -> Self:
        if self.columns is not None and self.text is None:
            raise ValueError("columns are of the tables that text names; the task's text has its own: give text, too")
        return self


class StudentSection(Section):
    """`[student]`: the form of the smaller model; `[assistant]`: that of a model between teacher and student."""

    form: Form | None = Field(
        default=None,
        description="How the student is made: fewer blocks, low-rank factors in place of matrices, narrower layers, "
        "or another model. Left out, the method's own (an assistant's: \"width\").",
    )
    # depth
    layers: Blocks | list[NonNegativeInt] | None = Field(
        default=None,
        description="depth, width, checkpoint: a number of blocks; depth and checkpoint also a list of the block "
        "numbers that are kept, from 0. Left out, half of the teacher's blocks for depth, and else all.",
    )
    select: Literal["even", "spread", "ends", "first", "last"] | None = Field(
        default=None,
        description="depth, checkpoint: which blocks a number of layers keeps: at even distances up to the last, the "
        'first and the last and evenly between ("spread"), the first ones and the last ones without the middle '
        '("ends"), the first ones, or the last ones. Left out, ends for decoders and models of images, else even, '
        "unless the method has a default of its own.",
    )
    # low-rank
    budget: Fraction | None = Field(
        default=None,
        description="low-rank: share of the block weights that is kept. Left out, a half unless another size is given.",
    )
    rank: Width | None = Field(
        default=None, description="low-rank: one rank for all block matrices, in place of a budget."
    )
    params: Annotated[int, Field(gt=0, le=PARAMETERS)] | str | None = Field(
        default=None,
        description='low-rank: parameters of the whole model, such as 14500000 or "14.5M", in place of a budget.',
    )
    energy: Fraction | None = Field(
        default=None,
        description="low-rank: share of the sum of squared singular values that every matrix keeps, in place of a "
        "budget.",
    )
    embedding_rank: Width | None = Field(
        default=None,
        description="low-rank: rank of the word embeddings' factors, which a head that shares the embeddings shares; a "
        "matrix of its own that predicts tokens gets factors of this rank, too. Left out, they stay dense.",
    )
    ranks: Literal["even", "spread"] | None = Field(
        default=None,
        description="low-rank: one rank for all matrices that a budget or params pays for, or more of it where a rank "
        'is worth more to the loss on training rows. Left out, "spread" where there is a loss.',
    )
    rank_multiple: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        default=None,
        description="low-rank: every rank that a budget or params gives is a multiple of this. Left out, 8 for spread "
        "ranks of matrices that are 128 wide or more, otherwise 1.",
    )
    init_samples: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        default=256, description="low-rank, width with projections: how many training rows are looked at for the start."
    )
    sequential: bool = Field(
        default=False,
        description="low-rank: look at each block's inputs as the factors of the blocks before it make them, not as "
        "the teacher does.",
    )
    # width
    hidden_size: Width | None = Field(
        default=None, description="width: width of the hidden states. Left out, the teacher's."
    )
    intermediate_size: Width | None = Field(
        default=None, description="width: width of the feed-forward layer. Left out, the teacher's."
    )
    heads: Heads | None = Field(
        default=None,
        description="width: attention heads. Left out, as many of the teacher's width as fit; else as many as it has.",
    )
    kv_heads: Heads | None = Field(
        default=None,
        description="width: heads of keys and values, in families where these may be fewer; their number divides that "
        "of the heads. Left out, as many in proportion as the teacher has.",
    )
    init: Literal["teacher", "random", "svd", "activations", "gradients", "both", "projections"] | None = Field(
        default=None,
        description="What the weights start from. depth, width: the teacher's weights (for width, slices of them), or "
        "at random: a depth student's blocks, all of a width student. width also trained projections of the teacher's "
        'weights, from principal directions of its activations, merged at the end ("projections"). low-rank: the '
        'factors that are closest to a matrix ("svd"), to what it makes of its inputs for training rows '
        '("activations"), to a matrix whose rows weigh as much as the loss changes with them ("gradients"), or the '
        'last two together ("both"); but for "svd", factors of embeddings are closest for the tokens that are frequent '
        'in these rows. checkpoint: the weights of its file, or all at random ("random"). Left out, "teacher"; for '
        'low-rank "both", or "activations" where nothing has a loss; for checkpoint the weights of its file.',
    )
    alignment: NonNegativeFloat = Field(
        default=1.0,
        description='width, init = "projections": weight of a term that compares the output of every block matrix with '
        "the teacher's, through the same projections.",
    )
    # checkpoint
    model: str | None = Field(
        default=None, description="checkpoint: the student, a hub name or a folder. Give it for this form."
    )
    # all forms
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="Number type of the student's file. Left out, that of the teacher's file."
    )
    vocabulary: VocabularySection | None = Field(
        default=None,
        description="The pieces of the teacher's vocabulary that the student has, and an assistant before it. Left "
        "out, all.",
    )

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
                raise ValueError(f'form = "{self.form}" has no {", ".join(map(self._as_written, unsupported))}')
        sizes = [k for k in ("budget", "rank", "params", "energy") if getattr(self, k) is not None]
        if len(sizes) > 1:
            raise ValueError(f"give one of budget, rank, params and energy, not {' and '.join(sizes)}")
        if self.rank_multiple is not None and (self.rank is not None or self.energy is not None):
            raise ValueError("rank_multiple is of ranks that a budget or params gives, not of a rank or energy")
        if self.ranks == "spread" and (self.rank is not None or self.energy is not None):
            raise ValueError('ranks = "spread" divides a budget or params, so it cannot stand beside a rank or energy')
        others = {"width": ("alignment", "init_samples")}.get(self.form or "", ("alignment",))
        if self.init != "projections" and (idle := [n for n in others if getattr(self, n) != self._default(n)]):
            raise ValueError(f'{" and ".join(idle)}: only a width student with init = "projections" has this')
        if self.form == "checkpoint" and self.model is None:
            raise ValueError('form = "checkpoint" needs model = "FOLDER OR HUB NAME"')
        return self

    @classmethod
    def _default(cls, key: str) -> Any:
        return cls.model_fields[key].default

    def _as_written(self, key: str) -> str:
        return f'init = "{self.init}"' if key == "init" else key

    def unsupported_fields(self, form: Form) -> list[str]:
        """Return the fields with another value than their default that this form does not have."""
        others = dict.fromkeys(key for keys in FORM_FIELDS.values() for key in keys if key not in FORM_FIELDS[form])
        fields = [key for key in others if getattr(self, key) != self._default(key)]
        if self.init is not None and self.init not in STARTS[form] and "init" not in fields:
            fields.append("init")
        return fields


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


class MethodSection(Named):
    """`method = "makd"` or a `[method]` table: the name, and the method's own options beside it."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    name: str = Field(
        description="The method's name; `kdcli methods` lists them. Its own options stand beside the name."
    )

    @property
    def options(self) -> dict[str, Any]:
        """The options as written; the method's own schema checks them."""
        return dict(self.__pydantic_extra__ or {})


class OverparamSection(Section):
    """`[overparam]`: chains of tensors in place of the student's matrices while it trains (OPDF, arXiv 2411.06448)."""

    factorization: Literal["mpo", "svd", "svd-plain"] = Field(
        default="mpo",
        description='What a matrix becomes: a chain of tensors ("mpo"), such a chain without middle tensors ("svd"), '
        'or the two factors of a plain SVD ("svd-plain").',
    )
    length: Annotated[int, Field(ge=0, le=32)] = Field(
        default=3, description="Number of middle tensors of a chain (L of the paper)."
    )
    scale: Annotated[float, Field(gt=1.0, le=1000.0)] | None = Field(
        default=None,
        description="Weights of a chain per weight of its matrix; the length follows from it, matrix by matrix. Left "
        "out, `length` holds for all.",
    )
    factors: dict[str, list[PositiveInt]] | None = Field(
        default=None,
        description='Factor lists of dimensions, such as {"768" = [32, 1, 24]}. Left out, they are chosen.',
    )
    targets: list[Literal["attention", "ffn"]] = Field(
        default=["attention", "ffn"], description="Which matrices of a block become chains."
    )
    layers: list[NonNegativeInt] | None = Field(
        default=None, description="Blocks whose matrices become chains, from 0. Left out, all."
    )
    aux_weight: NonNegativeFloat = Field(
        default=1.0,
        description="Weight of the loss between the student's and the teacher's chains without their central tensors; "
        "0 switches it off.",
    )
    aux_reduction: Literal["mean", "sum"] = Field(
        default="mean", description="How that loss is taken over the matrices."
    )
    aux_mismatch: Literal["skip", "truncate"] = Field(
        default="skip",
        description="What happens to matrices that the teacher has in another shape: they are skipped, or compared in "
        "their leading parts.",
    )
    gauge: Literal["symmetric", "left"] = Field(
        default="symmetric",
        description="How a bond's singular values are shared: equally between both its sides, or none to the left one.",
    )
    svd_dtype: Literal["float32", "float64"] = Field(
        default="float64", description="Number type that the decompositions are computed in."
    )
    select: Literal["all", "static", "dynamic"] = Field(
        default="all",
        description="Which of these matrices become chains: all, or (OPF) as many as `matrices` says. Static: those "
        "whose weights, set to zero, change the student's loss on training rows most before it is trained. Dynamic: a "
        "few every so many steps, those of the greatest sum of |gradient x weight| so far.",
    )
    matrices: PositiveInt | None = Field(
        default=None, description="Number of matrices that become chains. Give it with select, and only then."
    )
    select_count: PositiveInt = Field(
        default=2, description='Number of matrices that become chains at once, with select = "dynamic".'
    )
    select_every: PositiveInt | None = Field(
        default=None,
        description='Steps between two such choices, with select = "dynamic". Left out, all are made in the first '
        "third of a training.",
    )
    train: Literal["all", "auxiliary"] = Field(
        default="all",
        description="Which tensors of a chain train: all of them, or all but the central one, which stays as it starts "
        "(MPOP, arXiv 2106.02205).",
    )
    learning_rate: PositiveFloat | Literal["matched", "by-length"] = Field(
        default="matched",
        description='Learning rate of the chains: a number; "by-length", the student\'s / (1.5 + 0.8 L) for a chain '
        "with L middle tensors, since a step on all tensors moves the matrix about that much further; or "
        '"matched", the student\'s, with every step scaled so that the matrix moves as far as a plain one would.',
    )


class TrainSection(Section):
    """`[train]`: the training loop."""

    epochs: PositiveFloat | None = Field(
        default=None, description="Passes over the training rows. Left out, the method's."
    )
    max_steps: PositiveInt | None = Field(
        default=None, description="Optimizer steps, instead of epochs. Left out, they follow from the epochs."
    )
    batch_size: BatchSize = Field(
        default=32, description="Examples of one optimizer step, over all devices and accumulation steps."
    )
    gradient_accumulation: BatchSize = Field(
        default=1, description="Parts that a step's examples are computed in, to save memory; it divides batch_size."
    )
    learning_rate: PositiveFloat | None = Field(
        default=None, description="The highest learning rate of AdamW. Left out, the method's."
    )
    scheduler: Literal["linear", "cosine", "constant"] | None = Field(
        default=None,
        description="How the learning rate goes on after the warm-up. Left out, the method's, mostly linear to 0.",
    )
    warmup: Share | None = Field(
        default=None, description="Share of the steps in which the learning rate rises from 0. Left out, the method's."
    )
    weight_decay: NonNegativeFloat | None = Field(
        default=None,
        description="AdamW's weight decay of matrices; biases and layer norms have none. Left out, the method's.",
    )
    betas: Betas | None = Field(
        default=None,
        description="AdamW's decay rates of the mean gradient and of the mean squared gradient. Left out, the "
        "method's, mostly 0.9 and 0.999.",
    )
    epsilon: Epsilon | None = Field(
        default=None,
        description="What AdamW adds to the root of the mean squared gradient, which it divides by. Left out, the "
        "method's, mostly 1e-8.",
    )
    max_grad_norm: PositiveFloat | None = Field(
        default=None, description="Gradients are scaled down to at most this norm. Left out, the method's, mostly 1."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description='Number type of the forward pass; "auto" is bf16 wherever the hardware multiplies in it, a GPU or '
        "a CPU.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description='Where to train; "auto" is a GPU where there is one.'
    )
    sharding: Literal["none", "fsdp"] | None = Field(
        default=None,
        description='What several processes do with a student: "none" gives each a whole one (DDP), "fsdp" a part of '
        "its weights, gradients and moments (FSDP2), block by block. Left out, none, or what accelerate launch says "
        "(--use_fsdp --fsdp_version 2).",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Keep the input of each block alone for the backward pass, which then runs the block once more: "
        "less memory, about a third more time.",
    )
    group_by_length: bool = Field(
        default=True, description="Make batches of texts of like length, which saves padding."
    )
    eval_every: PositiveInt | None = Field(
        default=None, description="Optimizer steps between two evaluations. Left out, an epoch."
    )
    patience: PositiveInt | None = Field(
        default=None,
        description="Evaluations without a better score after which training stops. Left out, it never stops early.",
    )
    select: Literal["best", "last"] = Field(
        default="best",
        description="Which checkpoint becomes the student: the one with the best score, or the last one.",
    )
    log_every: PositiveInt | None = Field(
        default=None,
        description="Optimizer steps between two points of the curves. Left out, it is chosen, for at least 20 points.",
    )
    workers: Annotated[int, Field(ge=0, le=256)] = Field(
        default=0,
        description="Processes that prepare batches, and decode images; 0 prepares them in the training process.",
    )
    keep_checkpoints: bool = Field(
        default=False, description="Keep the checkpoints, optimizer states and all, when the run is done."
    )

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

    protocol: Literal["dev", "half-dev"] = Field(
        default="dev",
        description='"dev": the whole validation set chooses the checkpoint and is reported. "half-dev": its first '
        "half chooses, the second one is reported.",
    )
    batch_size: BatchSize = Field(default=64, description="Examples of one forward pass.")
    fail_under: float | None = Field(
        default=None,
        description="End with exit code 1 when the student's score is below this one, or its perplexity above. Left "
        "out, there is no such gate.",
    )
    fail_under_retention: float | None = Field(
        default=None,
        description="End with exit code 1 when student score / teacher score (of perplexity teacher / student) is "
        "below this. Left out, there is no such gate.",
    )


class ExportSection(Section):
    """`[export]`: the ONNX file and its latency grid; `onnx = true` exports at the end of the run."""

    onnx: bool = Field(default=False, description="Export the student as ONNX at the end of the run.")
    opset: Annotated[int, Field(ge=20, le=23)] = Field(default=23, description="ONNX opset of the file.")
    builder: Literal["auto", "genai", "kdcli"] = Field(
        default="auto",
        description="What makes the graph of a causal language model: the model builder of ONNX Runtime GenAI "
        "(genai), kdcli's own exporter, or the builder where it is installed, knows the model and has no low-rank "
        "factors to merge (auto).",
    )
    precision: Literal["fp32", "fp16", "int8", "int4"] = Field(
        default="fp32",
        description="Weights of the graph of a causal language model; fewer bits need the builder of ONNX Runtime "
        "GenAI.",
    )
    batch_sizes: list[BatchSize] = Field(default=[1, 8], description="Batch sizes of the latency grid.")
    sequence_lengths: list[Tokens] | None = Field(
        default=None,
        min_length=1,
        description="Sequence lengths of the latency grid, in tokens. Left out, 16 and 128.",
    )
    image_sizes: list[Annotated[int, Field(gt=0, le=8192)]] | None = Field(
        default=None,
        min_length=1,
        description="Sides of square images of the latency grid, in pixels, for families that interpolate positions. "
        "Left out, the size that the model reads.",
    )
    threads: Times | None = Field(
        default=None,
        description="Threads that latency is measured with. Left out, OMP_NUM_THREADS, or the cores that the process "
        "may use.",
    )
    runs: PositiveInt | None = Field(
        default=None,
        description="Timed runs of each cell of the grid. Left out, 30, or as many as fit into a minute for the whole "
        "grid.",
    )


class Recipe(Section):
    """A whole recipe. `task`, `method` and `teacher` are enough; relative paths start at the recipe's folder."""

    task: TaskSection = Field(description="What the student learns: a task's name, or a table.")
    method: MethodSection = Field(
        description="How it learns: a method's name, or a table with the name and the method's own options."
    )
    teacher: TeacherSection = Field(description="The model to distil from.")
    name: Name | None = Field(default=None, description="The run's name. Left out, the recipe's file name.")
    student: StudentSection = Field(default=StudentSection(), description="The form of the smaller model.")
    assistant: StudentSection | None = Field(
        default=None,
        description="A model between teacher and student, distilled first and then the student's teacher. Left out, "
        "none.",
    )
    overparam: OverparamSection | None = Field(
        default=None,
        description="Chains of tensors in place of the student's matrices while it trains. Left out, none.",
    )
    train: TrainSection = Field(default=TrainSection(), description="The training loop.")
    evaluate: EvaluateSection = Field(
        default=EvaluateSection(), description="How the student is scored, and the gates."
    )
    export: ExportSection = Field(default=ExportSection(), description="The ONNX file and its latency grid.")
    finetune: list[DownstreamSection] = Field(
        default=[],
        description="Tasks that a general student is fine-tuned and scored on after distilling on plain text.",
    )
    seed: Seed = Field(default=42, description="Seed of everything random.")
    output: str | None = Field(default=None, description="Folder for runs. Left out, runs/ in the working folder.")

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
    def _black_box(self) -> Self:
        if self.teacher.black_box and self.evaluate.fail_under_retention is not None:
            raise ValueError("evaluate.fail_under_retention needs a teacher with a score; a black box has none")
        return self

    @model_validator(mode="after")
    def _one_vocabulary(self) -> Self:
        if self.assistant is not None and self.assistant.vocabulary is not None:
            raise ValueError("assistant.vocabulary: an assistant reads what its student reads; set student.vocabulary")
        return self
