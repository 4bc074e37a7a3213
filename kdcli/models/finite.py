"""Numbers that are none: NaN and infinities in weights and logits."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kdcli.errors import InputError, RunError

if TYPE_CHECKING:
    from torch import nn


class NotFiniteError(RunError):
    """A model's weights or logits contain NaN or inf: no score, file or graph is made of them."""


def first_not_finite(model: "nn.Module") -> str | None:
    """Return the name of the first parameter of `model` that contains NaN or inf; None when all are finite."""
    import torch

    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.numel()]
    if not named:
        return None
    finite = torch.stack([torch.isfinite(parameter.detach()).all() for _, parameter in named]).tolist()
    return next((name for (name, _), good in zip(named, finite, strict=True) if not good), None)


def check_finite(logits: Any, owner: str) -> None:
    """Raise NotFiniteError, naming `owner` ("the teacher"), when logits (n, ...) contain NaN or inf."""
    import numpy as np

    rows = np.asarray(logits).reshape(len(logits), -1)
    bad = int((~np.isfinite(rows).all(axis=1)).sum())
    if bad:
        raise NotFiniteError(
            f"the logits of {owner} contain NaN or inf (for {bad:,} of {len(rows):,} inputs)",
            hint="its weights are damaged, or too large for the precision that it runs in",
        )


def check_weights(model: "nn.Module", owner: str) -> None:
    """Raise NotFiniteError, naming `owner` and the parameter, when a model's weights contain NaN or inf."""
    if (name := first_not_finite(model)) is not None:
        raise NotFiniteError(f"the weights of {owner} contain NaN or inf (first: {name})", hint="the file is damaged")


@contextlib.contextmanager
def at_fault(where: str) -> Iterator[None]:
    """Make an InputError of a NotFiniteError: the model that `where` names is the input that is wrong."""
    try:
        yield
    except NotFiniteError as error:
        raise InputError(error.message, where=where, hint=error.hint) from error
