"""Teacher beside student: scores, sizes, and how much was kept."""

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from kdcli.evaluation.score import primary_score
from kdcli.models.counts import count_parameters
from kdcli.tasks.base import Task


@dataclass(frozen=True)
class Described:
    """A model's scores and sizes."""

    metrics: dict[str, dict[str, float]]
    parameters: int
    megabytes: float


def describe_model(model: Any, scores: dict[str, dict[str, float]]) -> Described:
    """Return scores, parameters, and megabytes (10^6 bytes) of the weights as they are stored."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return Described(scores, count_parameters(model), round(size / 1e6, 3))


@dataclass(frozen=True)
class Comparison:
    """The result of a run. retention = student / teacher on the first metric."""

    primary: str
    teacher: Described
    student: Described
    teacher_score: float
    student_score: float

    @property
    def retention(self) -> float | None:
        """Student's score as a share of the teacher's; None when the teacher's is not above 0."""
        return self.student_score / self.teacher_score if self.teacher_score > 0 else None

    def to_json(self) -> dict[str, Any]:
        def side(model: Described, score: float) -> dict[str, Any]:
            return {
                "score": score,
                "metrics": model.metrics,
                "parameters": model.parameters,
                "megabytes": model.megabytes,
            }

        return {
            "primary": self.primary,
            "teacher": side(self.teacher, self.teacher_score),
            "student": side(self.student, self.student_score),
            "retention": self.retention,
            "compression": self.teacher.parameters / self.student.parameters,
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Comparison":
        """Return the comparison that a run.json holds."""

        def side(model: dict[str, Any]) -> Described:
            return Described(model["metrics"], model["parameters"], model["megabytes"])

        teacher, student = record["teacher"], record["student"]
        return cls(record["primary"], side(teacher), side(student), teacher["score"], student["score"])

    def table(self) -> Table:
        table = Table()
        table.add_column("")
        for name in ("teacher", "student", "student / teacher"):
            table.add_column(name, justify="right")
        for name, metrics in self.teacher.metrics.items():
            for metric, value in metrics.items():
                other = self.student.metrics[name][metric]
                ratio = f"{other / value:.1%}" if value > 0 else ""
                table.add_row(f"{metric} ({name})", f"{100 * value:.2f}", f"{100 * other:.2f}", ratio)
        table.add_row(
            "parameters",
            f"{self.teacher.parameters:,}",
            f"{self.student.parameters:,}",
            f"{self.student.parameters / self.teacher.parameters:.1%}",
        )
        table.add_row(
            "megabytes",
            f"{self.teacher.megabytes:.1f}",
            f"{self.student.megabytes:.1f}",
            f"{self.student.megabytes / self.teacher.megabytes:.1%}",
        )
        return table


def compare(task: Task, *, teacher: Described, student: Described) -> Comparison:
    """Return teacher and student side by side."""
    return Comparison(
        task.primary,
        teacher,
        student,
        primary_score(teacher.metrics, task.primary),
        primary_score(student.metrics, task.primary),
    )
