"""What a distillation on plain text reached: the held-out loss, the sizes, and scores on tasks afterwards."""

from dataclasses import dataclass, field
from statistics import mean
from typing import Any


@dataclass(frozen=True)
class TaskScores:
    """Scores on one task of models that were fine-tuned in the same way, one score a seed."""

    task: str
    metric: str
    scores: dict[str, list[float]]
    metrics: dict[str, list[dict[str, dict[str, float]]]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "metric": self.metric,
            "scores": self.scores,
            "mean": {name: mean(values) for name, values in self.scores.items()},
            "metrics": self.metrics,
        }


@dataclass(frozen=True)
class General:
    """The result of a run on plain text.

    loss: the distillation loss on held-out text, before and after. parameters, megabytes: of teacher and student.
    """

    loss: tuple[float | None, float | None]
    parameters: tuple[int, int]
    megabytes: tuple[float, float]
    finetune: list[TaskScores]

    def to_json(self) -> dict[str, Any]:
        sides = [
            {"parameters": count, "megabytes": size}
            for count, size in zip(self.parameters, self.megabytes, strict=True)
        ]
        return {
            "primary": "loss",
            "loss": {"before": self.loss[0], "after": self.loss[1]},
            "teacher": sides[0],
            "student": sides[1],
            "compression": self.parameters[0] / self.parameters[1],
            "finetune": [scores.to_json() for scores in self.finetune],
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "General":
        """Return the result that a run.json holds."""
        teacher, student = record["teacher"], record["student"]
        return cls(
            (record["loss"]["before"], record["loss"]["after"]),
            (teacher["parameters"], student["parameters"]),
            (teacher["megabytes"], student["megabytes"]),
            [TaskScores(s["task"], s["metric"], s["scores"], s["metrics"]) for s in record["finetune"]],
        )
