"""Teacher beside student: scores, sizes, and how much was kept."""

from dataclasses import dataclass, field
from typing import Any

from kdcli.evaluation.score import primary_score
from kdcli.models.counts import count_parameters
from kdcli.models.save import stored_type
from kdcli.tasks.base import Task


@dataclass(frozen=True)
class Described:
    """A model's scores and sizes."""

    metrics: dict[str, dict[str, float]]
    parameters: int
    megabytes: float


def describe_model(model: Any, scores: dict[str, dict[str, float]]) -> Described:
    """Return scores, parameters, and megabytes (10^6 bytes) of the weights in the type that their file has."""
    size = count_parameters(model) * stored_type(model).itemsize
    return Described(scores, count_parameters(model), round(size / 1e6, 3))


def described_set(name: str, rows: int | None) -> str:
    """Return a report set's name with its rows, where they are known."""
    return name if rows is None else f"{name}, {rows:,} example{'' if rows == 1 else 's'}"


@dataclass(frozen=True)
class Comparison:
    """The result of a run. retention = student / teacher on the first metric; of a black box nothing is known.

    rows: how many rows of each report set a score stands on.
    """

    primary: str
    teacher: Described | None
    student: Described
    teacher_score: float | None
    student_score: float
    rows: dict[str, int] = field(default_factory=dict)

    @property
    def retention(self) -> float | None:
        """Student's score as a share of the teacher's; None when the teacher's is not above 0."""
        return self.student_score / self.teacher_score if self.teacher_score and self.teacher_score > 0 else None

    def to_json(self) -> dict[str, Any]:
        def side(model: Described | None, score: float | None) -> dict[str, Any] | None:
            if model is None:
                return None
            return {
                "score": score,
                "metrics": model.metrics,
                "parameters": model.parameters,
                "megabytes": model.megabytes,
            }

        return {
            "primary": self.primary,
            "rows": self.rows,
            "teacher": side(self.teacher, self.teacher_score),
            "student": side(self.student, self.student_score),
            "retention": self.retention,
            "compression": self.teacher.parameters / self.student.parameters if self.teacher is not None else None,
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Comparison":
        """Return the comparison that a run.json holds."""

        def side(model: dict[str, Any]) -> Described:
            return Described(model["metrics"], model["parameters"], model["megabytes"])

        teacher, student = record["teacher"], record["student"]
        return cls(
            record["primary"],
            side(teacher) if teacher is not None else None,
            side(student),
            teacher["score"] if teacher is not None else None,
            student["score"],
            record.get("rows", {}),
        )


def compare(task: Task, *, teacher: Described | None, student: Described) -> Comparison:
    """Return teacher and student side by side; without a teacher the student alone."""
    return Comparison(
        task.primary,
        teacher,
        student,
        primary_score(teacher.metrics, task.primary) if teacher is not None else None,
        primary_score(student.metrics, task.primary),
        {name: len(rows) for name, rows in task.report.items()},
    )
