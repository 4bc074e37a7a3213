"""What a method is: a named, citable choice of objectives, schedule and defaults."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from kdcli.errors import InputError
from kdcli.models.shape import ModelShape
from kdcli.objectives.term import FORWARD_KL, Divergence, Term

if TYPE_CHECKING:
    from kdcli.tasks.base import Task
    from kdcli.tasks.kind import TaskKind
    from kdcli.training.schemes.base import Scheme


class Options(BaseModel):
    """Base of a method's own options, which stand beside its name in `[method]`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Context:
    """What a method may know: shapes, never weights. `pairs` are (student block, teacher block) from 1.

    kind: of the task; a method asks what it provides, never which it is. seed: the recipe's, for what a method draws
    itself. projected: whether the student's weights are trained projections of the teacher's, by which hidden states of
    different widths compare. augmented: whether copies of rows with other words are trained on. factored_embeddings:
    whether the student's word embeddings are low-rank factors. max_length: the most tokens of a row.
    """

    teacher: ModelShape
    student: ModelShape
    student_form: str
    kind: "TaskKind"
    pairs: list[tuple[int, int]]
    seed: int = 0
    augmented: bool = False
    projected: bool = False
    factored_embeddings: bool = False
    max_length: int = 128

    @property
    def plain_text(self) -> bool:
        """True where what is predicted are masked tokens over a vocabulary, and nothing else is to be learnt."""
        return self.over_vocabulary and "labels" not in self.kind.provides

    @property
    def over_vocabulary(self) -> bool:
        """True where what is predicted are tokens, masked or next ones."""
        return "vocabulary" in self.kind.provides

    @property
    def has_gold(self) -> bool:
        """True where rows have gold answers; where they have none there is no gold term."""
        return self.kind.has_gold

    def output_term(
        self,
        weight: float = 1.0,
        temperature: float = 1.0,
        *,
        divergence: Divergence = FORWARD_KL,
        **options: Any,
    ) -> Term:
        """Return the divergence from the teacher's predictions. options: those of `OutputObjective`.

        Raises InputError for embeddings of two widths: these have no angle between them; and for a divergence of
        classes where predictions are none.
        """
        from kdcli.objectives.output import OutputObjective

        teacher, student = self.teacher.embedding, self.student.embedding
        if weight > 0 and teacher != student:
            raise InputError(
                f"embeddings can be compared between equal widths, not {teacher} of the teacher and {student} of the "
                "student",
                where="method",
                hint='use method "embedding", which has a map between them, or take weight from the prediction',
            )
        distribution = self.kind.distribution.compared_by(divergence, where="method.divergence")
        return Term("output", OutputObjective(distribution, temperature, **options), weight)

    def gold_term(self, weight: float = 1.0) -> Term:
        """Return the loss of the gold answers: "task" for labels, "mlm" for masked tokens."""
        from kdcli.objectives.gold import GoldObjective

        return Term("mlm" if self.plain_text else "task", GoldObjective(self.kind.distribution), weight)

    def prediction_terms(self, weight: float, alpha: float, temperature: float, **options: Any) -> list[Term]:
        """Return the teacher's predictions and the gold answers, alpha to 1 - alpha. options: of `output_term`.

        Without gold answers the teacher's predictions have all the weight.
        """
        if not self.has_gold:
            return [self.output_term(weight, temperature, **options)]
        return [self.output_term(weight * alpha, temperature, **options), self.gold_term(weight * (1.0 - alpha))]


@dataclass
class Stage:
    """A part of the training with its own terms: a share of all steps, or `epochs` of its own.

    scheme: how a step runs, where the method changes the loop itself.
    """

    name: str
    terms: list[Term]
    share: float = 1.0
    learning_rate: float | None = None
    epochs: float | None = None
    scheduler: str | None = None
    warmup: float | None = None
    scheme: "Scheme | None" = None


def _none(options: Any) -> frozenset[str]:
    return frozenset()


def _no_check(options: Any, context: Context) -> None:
    return None


def _never(options: Any) -> bool:
    return False


def _no_sources(options: Any, task: Any, base: Path) -> None:
    return None


def _no_notes(options: Any, context: Context) -> list[str]:
    return []


@dataclass(frozen=True)
class Method:
    """A method by name.

    title, paper, formula, signals, constraints, cost: for `kdcli methods`. options: the schema of its own
    options. student, train: defaults for those tables; where tokens are predicted text_train comes before train, and
    on images image_student before student.
    check(options, context) raises InputError for what cannot work, with the nearest setting that does.
    check_sources(options, task, base) raises InputError for files, programs and modules named in the options that are
    not there, and runs none of them; base is the folder that relative paths start from. load_sources(options, task,
    base) imports such code before a run's first work, and never for a dry run.
    build(options, context) returns the stages. notes(options, context): what was chosen for the user and is worth a
    line. needs: what a kind of task must provide (`kdcli.tasks.kind.CAPABILITIES`) for it to be used there.
    teacherless(options): whether answers are enough, without the teacher's model.
    from_base(options): which of "student" and "teacher" start from what the teacher was before its fine-tuning: a
    student that is cut from it, and the copy of it that a scheme trains.
    """

    name: str
    title: str
    paper: str
    formula: str
    signals: str
    constraints: str
    cost: str
    options: type[BaseModel]
    build: Callable[[Any, Context], list[Stage]]
    check: Callable[[Any, Context], None] = _no_check
    check_sources: Callable[[Any, "Task", Path], None] = _no_sources
    load_sources: Callable[[Any, "Task", Path], None] = _no_sources
    needs: frozenset[str] = frozenset({"labels"})
    student: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    text_train: dict[str, Any] = field(default_factory=dict)
    image_student: dict[str, Any] = field(default_factory=dict)
    teacherless: Callable[[Any], bool] = _never
    from_base: Callable[[Any], frozenset[str]] = _none
    notes: Callable[[Any, Context], list[str]] = _no_notes
