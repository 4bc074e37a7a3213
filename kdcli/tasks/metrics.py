"""What kind of number a score is, and how it is shown: fractions and correlations of 100, errors in their own unit."""

from kdcli.tasks import registry


def is_error(metric: str) -> bool:
    """Return whether less is better: perplexity, a mean squared error."""
    return any(metric in kind.errors for kind in registry.usable()[0])


def factor_of(metric: str) -> float:
    """Return by what a score is multiplied for people: 100, of errors 1."""
    return 1.0 if is_error(metric) else 100.0


def shown(metric: str, value: float) -> str:
    """Return a score as people read it."""
    return f"{value:.3f}" if is_error(metric) else f"{100 * value:.2f}"


def retention_of(metric: str, student: float, teacher: float) -> float | None:
    """Return the share of the teacher's score that a student keeps; of an error teacher / student.

    None where the teacher's score, or an error of the student, is not above 0.
    """
    if is_error(metric):
        student, teacher = teacher, student
    return student / teacher if teacher > 0 else None
