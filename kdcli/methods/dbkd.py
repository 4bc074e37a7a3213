"""DBKD: the teacher is a black box that returns labels, and nothing else."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, model_validator

from kdcli.errors import InputError
from kdcli.methods.base import Context, Method, Options, Stage
from kdcli.methods.terms import refuse_idle
from kdcli.recipe.schema import PositiveFloat, PositiveInt, Seed, Times

if TYPE_CHECKING:
    from kdcli.black_box.ask import BlackBox
    from kdcli.tasks.base import Task


class BlackBoxOptions(Options):
    """Who decides: one of callable, command and decisions. Paths and modules are looked for in the recipe's folder."""

    callable: str | None = Field(
        default=None,
        description='"module:function"; it takes a list of texts (or of pairs of texts, or of Pillow images) and '
        "returns a list of labels. Give this, command or decisions.",
    )
    command: Annotated[list[str], Field(min_length=1)] | None = Field(
        default=None,
        description='Program and arguments; it reads a JSON line {"text": ..., "text_pair": ...} for each question, or '
        '{"image": ...} with a PNG file in base64, and writes one label a line. Give this, callable or decisions.',
    )
    decisions: str | None = Field(
        default=None, description="A file of recorded decisions: JSONL, CSV or Parquet. Give this, callable or command."
    )
    timeout: PositiveFloat = Field(
        default=600.0, description="Seconds that the command may take for one portion of `queries_per_call` questions."
    )
    queries_per_call: PositiveInt = Field(default=1024, description="Questions that are asked in one call.")

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [key for key in ("callable", "command", "decisions") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError("give one of callable, command and decisions")
        return self

    def make(self, task: "Task", base: Path) -> "BlackBox":
        """Return the one who is asked. Raises InputError when there is no such function or program."""
        from kdcli.black_box.ask import Command, PythonCallable

        if self.callable is not None:
            return PythonCallable(self.callable, task.label_names, base)
        assert self.command is not None
        return Command(self.command, task.label_names, base, self.timeout)


class DBKDOptions(Options):
    """How decisions are gathered and what they weigh."""

    copies: Times = Field(
        default=10,
        description="Decisions that are asked for on each example (m of the paper): one on the example itself, the "
        "others on noised copies of it.",
    )
    ratio: Annotated[float, Field(gt=0.0, le=0.5)] = Field(
        default=0.1,
        description="How strong noise is: of texts the mean share of a copy's words that change, where each copy draws "
        "its own of at most 0.5; of images the standard deviation of Gaussian noise, as a share of the range of pixel "
        "values.",
    )
    noise_seed: Seed = Field(
        default=0,
        description="Seed of the noise, apart from the recipe's seed, so that runs of several seeds share their "
        "decisions.",
    )
    synonyms: bool = Field(
        default=False, description="Of texts: let noise also replace words by words with similar embeddings."
    )
    alpha: PositiveFloat = Field(
        default=0.7,
        description="Weight of the KL divergence from the estimated teacher logits, beside the gold labels' weight of "
        "1.",
    )
    temperature: PositiveFloat = Field(default=1.0, description="Temperature of that divergence.")
    sigma: PositiveFloat = Field(default=1.0, description="Factor that scales the estimated logits in the loss.")
    noise_std: PositiveFloat = Field(
        default=1.0,
        description="Standard deviation of the noise in the model of a decision, which logits are estimated under.",
    )
    black_box: BlackBoxOptions | None = Field(
        default=None,
        description="What is asked for decisions. Left out, the local teacher, of which only the label is used.",
    )


def check_sources(options: DBKDOptions, task: "Task", base: Path) -> None:
    """Raise InputError when the black box is not there, or its recorded decisions do not fit the task."""
    box = options.black_box
    if box is None:
        return
    if box.decisions is not None:
        from kdcli.black_box.answers import recorded
        from kdcli.files import expanded
        from kdcli.training.schemes.dbkd import DECISIONS

        recorded(base / expanded(box.decisions, "method.black_box.decisions"), task, DECISIONS)
    elif box.callable is not None:
        from kdcli.black_box.ask import find_callable

        find_callable(box.callable, base)
    else:
        box.make(task, base)


def load_sources(options: DBKDOptions, task: "Task", base: Path) -> None:
    """Import the black box's function. Raises InputError when that fails."""
    if options.black_box is not None and options.black_box.callable is not None:
        options.black_box.make(task, base)


def check(options: DBKDOptions, context: Context) -> None:
    """Raise InputError for examples that no noised copies are made of, and for options that have no effect."""
    provided = context.kind.provides
    if provided.isdisjoint({"text", "images"}):
        raise InputError(
            f"noised copies are made of texts and of images, and a task of type {context.kind.name} has neither",
            where="method.name",
        )
    if context.kind.inputs_change:
        raise InputError(
            "logits are estimated for training examples as they are, and those of this task change from epoch to epoch",
            where="method.name",
            hint="leave out what changes them: it stands in [task]",
        )
    if "images" in provided:
        refuse_idle(options, ("synonyms",), "on images, whose noise is on pixels")
    if options.black_box is not None and options.black_box.decisions is not None:
        refuse_idle(options, ("copies", "ratio", "noise_seed", "synonyms"), "beside recorded decisions")


def build(options: DBKDOptions, context: Context) -> list[Stage]:
    """Return one stage with the two terms, whose teacher is the table of logits behind decisions."""
    from kdcli.training.schemes.dbkd import DecisionScheme

    box = options.black_box
    scheme = DecisionScheme(
        copies=options.copies,
        ratio=options.ratio,
        noise_seed=options.noise_seed,
        synonyms=options.synonyms,
        noise_std=options.noise_std,
        scale=options.sigma,
        make_box=box.make if box is not None and box.decisions is None else None,
        file=box.decisions if box is not None else None,
        **({"queries_per_call": box.queries_per_call} if box is not None else {}),
    )
    terms = [context.output_term(options.alpha, options.temperature), context.gold_term()]
    return [Stage("distil", terms, scheme=scheme)]


def notes(options: DBKDOptions, context: Context) -> list[str]:
    """Say what the student is cut from."""
    if options.black_box is not None or context.student_form == "checkpoint":
        return []
    return ["the student is cut from the teacher's base model: of the fine-tuned teacher only labels are used"]


METHOD = Method(
    name="dbkd",
    title="Decisions (labels) of a black box",
    paper="Zhou, Yang, Li, Liu (2023): Bridging the Gap between Decision and Logits in Decision-based Knowledge "
    "Distillation for Pre-trained Language Models. arXiv 2306.08909",
    formula="CE(z_S, y) + alpha T^2 KL(softmax(sigma z / T) || softmax(z_S / T)), with z such that "
    "P(argmax_k (z_k + s xi_k) = i) is the share of decisions for i on the example and m - 1 noised copies",
    signals="decisions (labels) of the teacher on the examples and on noised copies, gold labels",
    constraints="none on the models; the teacher may be a black box that returns one label an example; a student is "
    "cut from what the teacher was before its fine-tuning. Not for spans, tags, several labels or numbers: logits are "
    "estimated from shares of decisions for one class. Images are noised on their pixels, at the size that the student "
    "reads, and must not change from epoch to epoch",
    cost="student only; before it m decisions an example, asked for once and kept",
    options=DBKDOptions,
    build=build,
    check=check,
    check_sources=check_sources,
    load_sources=load_sources,
    notes=notes,
    needs=frozenset({"labels", "classes", "one-per-example"}),
    teacherless=lambda options: options.black_box is not None,
    # It must know nothing of the teacher's weights.
    from_base=lambda options: frozenset() if options.black_box is not None else frozenset({"student"}),
    student={"form": "depth", "select": "first"},
    train={"epochs": 10.0, "learning_rate": 2e-5, "warmup": 0.1},
)
