"""Random signals of a small made-up model, so that objectives can be tested without one."""

from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor

from kdcli.signals import Prediction, Signals
from kdcli.tasks.classification import KIND as CLASSIFICATION
from kdcli.tasks.masked_lm import KIND as MASKED_LM

NAMES = ("query", "key", "value", "attention_output", "ffn_in", "ffn_out")


def mask_of(lengths: list[int], seq: int | None = None) -> Tensor:
    """Return (batch, seq) with 1 at each example's first tokens."""
    return (torch.arange(seq or max(lengths))[None] < torch.tensor(lengths)[:, None]).long()


def captured(
    seed: int,
    mask: Tensor,
    *,
    width: int = 16,
    layers: int = 3,
    heads: int = 4,
    classes: int = 3,
    vocabulary: int = 0,
    steps: int = 1,
    garbage: float = 0.0,
    first: int = 0,
) -> Signals:
    """Return signals of which every tensor is a leaf that wants a gradient, except logits and paths.

    The draw at a real token depends on the seed, the example's number (from `first`) and the token,
    never on the amount of padding, which holds random numbers of size `garbage`.
    Logits follow from hidden[0] by a small network. With a vocabulary they are (batch, seq, vocabulary) instead, which
    `answered` turns into a table.
    """
    batch, seq = mask.shape

    def draw(name: int, size: int) -> Tensor:
        rows = []
        for example in range(first, first + batch):
            generator = torch.Generator().manual_seed(1000 * seed + 50 * name + example)
            rows.append(torch.randn(64, size, generator=generator)[:seq])
        x = torch.stack(rows)
        noise = garbage * torch.randn(x.shape, generator=torch.Generator().manual_seed(name))
        return torch.where(mask[:, :, None] != 0, x, noise)

    signals = Signals(mask=mask, heads=heads)
    for layer in range(layers + 1):
        signals.hidden[layer] = draw(layer, width).requires_grad_()
    for layer in range(1, layers + 1):
        for number, name in enumerate(NAMES):
            signals.matrices[(layer, name)] = draw(10 + 6 * layer + number, width).requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    inner, outer = torch.randn(width, 8, generator=generator), torch.randn(8, classes, generator=generator)

    def head(x: Tensor) -> Tensor:
        real = mask[:, :, None].float()
        return ((torch.tanh(x @ inner / width**0.5) * real).sum(1) / real.sum(1)) @ outer

    points = [(signals.hidden[0] * (k / steps), k) for k in range(1, steps + 1)]
    signals.path = [(x, [Prediction(head(x))]) for x, _ in points] if steps > 1 else []
    logits = draw(40, vocabulary).requires_grad_() if vocabulary else head(signals.hidden[0])
    signals.predictions = [Prediction(logits)]
    return signals


def asked(mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the batch of a text: labels (batch, seq), -100 where no token is masked, and the flat positions."""
    masked, real = ((x.flatten()).nonzero().squeeze(-1) for x in (labels != -100, mask))
    return {
        "labels": labels,
        "masked_positions": masked,
        "real_positions": real,
        "masked_among_real": torch.searchsorted(real, masked),
    }


def answered(signals: Signals, batch: dict[str, Tensor], *, everywhere: bool = False) -> Signals:
    """Return the same signals with their predictions as the kind of task reads them from a model's output."""
    (table,) = signals.predictions
    kind = MASKED_LM if "masked_positions" in batch else CLASSIFICATION
    output = SimpleNamespace(logits=table.logits)
    return replace(signals, predictions=kind.predictions(output, batch, everywhere=everywhere))


def packed(*parts: Signals) -> Signals:
    """Return the rows of `parts` side by side: blocks of which each part is a document, without padding."""
    block = Signals(mask=torch.cat([part.mask for part in parts], dim=1), heads=parts[0].heads)
    block.segments = torch.cat([torch.full_like(part.mask, number) for number, part in enumerate(parts)], dim=1)
    for name in ("hidden", "matrices"):
        for key in getattr(parts[0], name):
            whole = torch.cat([getattr(part, name)[key].detach() for part in parts], dim=1)
            getattr(block, name)[key] = whole.requires_grad_()
    return block


def leaves(signals: Signals) -> dict[str, Tensor]:
    """Return every tensor of shape (batch, seq, ...) that may receive a gradient."""
    found = {f"hidden {key}": x for key, x in signals.hidden.items()}
    found |= {f"matrix {key}": x for key, x in signals.matrices.items()}
    if signals.predictions and signals.predictions[0].logits.is_leaf:
        found["logits"] = signals.predictions[0].logits
    return found
