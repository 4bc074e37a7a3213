"""What kinds of causal language models share: batches with the next tokens, predictions of them, and their losses."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kdcli.signals import Prediction
from kdcli.tasks.encode import Collator

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100
"""The label of a token that is not predicted."""

LOGITS = 2**27
"""Logits that are held at a time while a model is scored."""


class NextTokenCollator:
    """Pads rows on the right, and says which next tokens are predicted.

    Rows without `labels` are predicted whole. Beside ids, mask and segments a batch has `labels` (batch, seq), not
    shifted and -100 where a token is not predicted; `predicted_positions` (n,) and `real_positions`, flat into batch x
    seq: those whose next token is predicted, and all that are not padding; `predicted_among_real`, the places of the
    former among the latter; `targets` (n,), the tokens that follow them; and weights of sum 1, by which tokens weigh
    equally: `prediction_weights` (n,), and `example_weights` (batch,) for means over an example's real tokens.
    """

    def __init__(self, tokenizer: Any, *, multiple: int = 8) -> None:
        self.collate = Collator(tokenizer, multiple=multiple)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.collate([{name: value for name, value in row.items() if name != "labels"} for row in rows])
        ids, mask = batch["input_ids"], batch["attention_mask"]
        labels = torch.full_like(ids, IGNORED)
        for i, row in enumerate(rows):
            own = row.get("labels", row["input_ids"])
            labels[i, : len(own)] = torch.from_numpy(np.asarray(own, np.int64))
        # Nothing comes before the first token that could predict it.
        labels[:, 0] = IGNORED
        following = torch.full_like(labels, IGNORED)
        following[:, :-1] = labels[:, 1:]
        following = following.flatten()
        batch["labels"] = labels
        batch["predicted_positions"] = (following != IGNORED).nonzero().squeeze(-1)
        batch["real_positions"] = mask.flatten().nonzero().squeeze(-1)
        batch["predicted_among_real"] = torch.searchsorted(batch["real_positions"], batch["predicted_positions"])
        batch["targets"] = following[batch["predicted_positions"]]
        count = len(batch["targets"])
        batch["prediction_weights"] = torch.full((count,), 1.0 / max(count, 1))
        batch["example_weights"] = mask.sum(1) / mask.sum()
        return batch


def counts_of(features: "Dataset") -> np.ndarray:
    """Return how many tokens of each feature are predicted, and how many are real, (n, 2)."""
    from kdcli.data.rows import array_of, chunks_of

    real = array_of(features, "length")
    predicted = real - 1
    if "labels" in features.column_names:
        rows = (row for chunk in chunks_of(features, "labels") for row in chunk)
        predicted = np.array([np.count_nonzero(np.asarray(row[1:]) != IGNORED) for row in rows])
    return np.stack([predicted, real], 1)


def positions_of(batch: Mapping[str, Tensor], *, everywhere: bool) -> Tensor:
    """Return the positions whose next token is predicted, or all real ones; flat into batch x seq."""
    return batch["real_positions" if everywhere else "predicted_positions"]


def predictions_of(output: Any, batch: Mapping[str, Tensor], *, everywhere: bool) -> list[Prediction]:
    """Return one table with a row a predicted token, or a real one, over the vocabulary."""
    positions = positions_of(batch, everywhere=everywhere)
    logits, weights = output.logits, batch["prediction_weights"]
    if isinstance(logits, Tensor):
        logits = logits.flatten(0, 1)
        if len(logits) != len(positions):
            logits = logits[positions]
    if not everywhere:
        return [Prediction(logits, weights, batch["targets"])]
    real = (
        batch["example_weights"][positions // batch["labels"].shape[1]]
        / batch["attention_mask"].sum(1)[positions // batch["labels"].shape[1]]
    )
    return [Prediction(logits, real, batch["targets"], batch["predicted_among_real"], weights)]


def token_losses(output: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return, of each row of a batch, the sum of its tokens' losses, how many are predicted, and how many rightly."""
    table = predictions_of(output, batch, everywhere=False)[0]
    rows, seq = batch["labels"].shape
    found = torch.zeros(3, rows, dtype=torch.float64, device=table.logits.device)
    example = batch["predicted_positions"] // seq
    logits = table.logits.float()
    losses = torch.nn.functional.cross_entropy(logits, batch["targets"], reduction="none")
    right = logits.argmax(-1) == batch["targets"]
    for kept, values in zip(found, (losses, torch.ones_like(losses), right), strict=True):
        kept.index_add_(0, example, values.double())
    return dict(zip(("loss", "predicted", "right"), found, strict=True))


def losses_of(model: Any, features: "Dataset", collator: Any, *, ask: Any, batch_size: int, **options: Any) -> Any:
    """Return `token_losses` of all features, each an array (n,). ask, options: `predict`, and its options."""
    from kdcli.data.rows import array_of

    longest = int(array_of(features, "length").max())
    rows = max(1, min(batch_size, LOGITS // (longest * model.config.vocab_size)))
    return ask(model, features, collator, reduce=token_losses, batch_size=rows, **options)


def scores_of(losses: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the perplexity over all tokens, and the share of next tokens that are the most probable ones."""
    tokens = losses["predicted"].sum()
    return {
        "perplexity": float(np.exp(losses["loss"].sum() / tokens)),
        "accuracy": float(losses["right"].sum() / tokens),
    }


def ends_of(processor: Any, config: Any) -> set[int]:
    """Return the tokens that end a text: the tokenizer's, and those of the model's configuration."""
    named = getattr(config, "eos_token_id", None)
    found = {processor.eos_token_id, *(named if isinstance(named, list) else [named])}
    return {int(token) for token in found if token is not None}
