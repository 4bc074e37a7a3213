"""What kind of number a score is, and how it is shown: fractions and correlations of 100, errors in their own unit."""

from collections.abc import Iterable, Mapping

from kdcli.tasks import registry

DEVIATION = "/std"
"""What ends the name of a metric's standard deviation, over several drawn texts of a row, say."""


def is_error(metric: str) -> bool:
    """Return whether less is better: perplexity, a mean squared error."""
    return any(metric in kind.errors for kind in registry.usable()[0])


def factor_of(metric: str) -> float:
    """Return by what a score is multiplied for people: 100, of errors 1."""
    return 1.0 if is_error(metric) else 100.0


def shown(metric: str, value: float) -> str:
    """Return a score as people read it."""
    return f"{value:.3f}" if is_error(metric) else f"{100 * value:.2f}"


def names_of(metrics: Iterable[str]) -> list[str]:
    """Return the metrics that are shown: all but the deviations, which stand beside theirs."""
    return [name for name in metrics if not name.endswith(DEVIATION)]


def shown_of(metrics: Mapping[str, float], metric: str) -> str:
    """Return a score as people read it, with its standard deviation, if there is one."""
    deviation = metrics.get(f"{metric}{DEVIATION}")
    return shown(metric, metrics[metric]) + (f" ± {shown(metric, deviation)}" if deviation is not None else "")


def retention_of(metric: str, student: float, teacher: float) -> float | None:
    """Return the share of the teacher's score that a student keeps; of an error teacher / student.

    None where the teacher's score, or an error of the student, is not above 0.
    """
    if is_error(metric):
        student, teacher = teacher, student
    return student / teacher if teacher > 0 else None
