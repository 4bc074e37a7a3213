"""How scores are shown: fractions (0 to 1) and correlations (-1 to 1) of 100, errors in the labels' own unit."""

from kdcli.tasks import registry


def shown(metric: str, value: float) -> str:
    """Return a score as people read it."""
    own_unit = any(metric in kind.errors for kind in registry.usable()[0])
    return f"{value:.3f}" if own_unit else f"{100 * value:.2f}"
