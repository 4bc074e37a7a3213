"""DBKD: the teacher is a black box that returns labels, and nothing else."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, model_validator

from kdcli.methods.base import Context, Method, Options, Stage, Term
from kdcli.methods.terms import refuse_idle
from kdcli.recipe.schema import PositiveFloat, PositiveInt, Seed, Times

if TYPE_CHECKING:
    from kdcli.black_box.ask import BlackBox
    from kdcli.tasks.base import Task


class BlackBoxOptions(Options):
    """Who decides: one of the three. Paths and modules are looked for in the recipe's folder.

    callable: "module:function", called with a list of texts (or of pairs of texts), returns a list of labels.
    command: program and arguments; reads JSON lines {"text": ..., "text_pair": ...}, writes a label a line.
    decisions: a file of recorded decisions (JSONL, CSV, Parquet). timeout: seconds that a command may take for
    one portion of `queries_per_call` questions.
    """

    callable: str | None = None
    command: Annotated[list[str], Field(min_length=1)] | None = None
    decisions: str | None = None
    timeout: PositiveFloat = 600.0
    queries_per_call: PositiveInt = 1024

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
    """How decisions are gathered and what they weigh.

    copies: noised copies of each example (m); ratio: the share of words that noise changes; noise_seed: of the
    noise, apart from the recipe's seed, so that several runs share their decisions. synonyms: let noise use words
    with similar embeddings (off, as in the released code, whose dictionary is no part of kdcli). noise_std: s, the
    noise of a decision; sigma: scale of the logits in the loss; alpha: weight of the KL term; black_box: who is
    asked; without it the local teacher, of whom only the label is used.
    """

    copies: Times = 10
    ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    noise_seed: Seed = 0
    synonyms: bool = False
    alpha: PositiveFloat = 0.7
    temperature: PositiveFloat = 1.0
    sigma: PositiveFloat = 1.0
    noise_std: PositiveFloat = 1.0
    black_box: BlackBoxOptions | None = None


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
    """Raise InputError for options about questions where none are asked."""
    if options.black_box is not None and options.black_box.decisions is not None:
        refuse_idle(options, ("copies", "ratio", "noise_seed", "synonyms"), "beside recorded decisions")


def build(options: DBKDOptions, context: Context) -> list[Stage]:
    """Return one stage with the two terms, whose teacher is the table of logits behind decisions."""
    from kdcli.objectives.gold import TaskObjective
    from kdcli.objectives.output import OutputObjective
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
    terms = [
        Term("output", OutputObjective(context.kind, options.temperature), options.alpha),
        Term("task", TaskObjective(context.kind)),
    ]
    return [Stage("distil", terms, scheme=scheme)]


METHOD = Method(
    name="dbkd",
    title="Decision-based distillation from a teacher that returns labels only",
    paper="Zhou, Yang, Li, Liu (2023): Bridging the Gap between Decision and Logits in Decision-based Knowledge "
    "Distillation for Pre-trained Language Models. arXiv 2306.08909",
    formula="CE(z_S, y) + alpha T^2 KL(softmax(sigma z / T) || softmax(z_S / T)), with z such that "
    "P(argmax_k (z_k + s xi_k) = i) is the share of decisions for i on m noised copies",
    signals="decisions (labels) of the teacher on noised copies, gold labels",
    constraints="classification",
    cost="student only; before it m decisions an example, asked for once and kept",
    options=DBKDOptions,
    build=build,
    check=check,
    check_sources=check_sources,
    load_sources=load_sources,
    kinds=frozenset({"classification"}),
    teacherless=lambda options: options.black_box is not None,
    student={"form": "depth", "select": "first"},
    train={"epochs": 10.0, "learning_rate": 2e-5, "warmup": 0.1},
)
