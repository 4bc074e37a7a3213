"""What a distillation on plain text reached: the held-out loss, the sizes, and scores on tasks afterwards."""

from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

from rich.table import Table


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

    def table(self) -> Table:
        table = Table()
        names = list(dict.fromkeys(["teacher", "student", *(n for s in self.finetune for n in s.scores)]))
        table.add_column("")
        for name in names:
            table.add_column("from scratch" if name == "scratch" else name, justify="right")
        for result in self.finetune:
            cells = [_score(result.scores.get(name, [])) for name in names]
            table.add_row(f"{result.metric} ({result.task})", *cells)
        empty = [""] * (len(names) - 2)
        table.add_row("parameters", *(f"{count:,}" for count in self.parameters), *empty)
        table.add_row("megabytes", *(f"{size:.1f}" for size in self.megabytes), *empty)
        before, after = self.loss
        if before is not None and after is not None:
            table.add_row("held-out loss", "", f"{before:.4f} to {after:.4f}", *empty)
        return table


def _score(values: list[float]) -> str:
    if not values:
        return ""
    return f"{100 * mean(values):.2f}" + (f" +- {100 * stdev(values):.2f}" if len(values) > 1 else "")
