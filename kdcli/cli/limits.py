"""Options of several commands that set a limit for a result."""

import math
from typing import Annotated

import typer


def finite(value: float | None) -> float | None:
    """Return an option's number. Raises BadParameter for NaN and the infinities, which are a limit of nothing."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value


FailUnder = Annotated[
    float | None,
    typer.Option(
        "--fail-under", callback=finite, help="Exit with 1 when the score is below (0 to 1); a perplexity, above."
    ),
]
FailUnderRetention = Annotated[
    float | None,
    typer.Option(
        "--fail-under-retention", callback=finite, help="Exit with 1 below this share of the teacher's score."
    ),
]
MaxLatency = Annotated[
    float | None,
    typer.Option(
        "--max-latency-ms",
        min=0,
        callback=finite,
        help="Exit with 1 when the first cell's p50 in ONNX Runtime is above (of a decoder: for a next token).",
    ),
]
