"""Comparing a graph's outputs with its model's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcli.export.decoder import OnnxDecoder
from kdcli.export.decoder_graph import TorchText
from kdcli.export.session import OnnxModel
from kdcli.models.finite import check_finite
from kdcli.models.inputs import model_inputs
from kdcli.models.shape import longest_input

TOLERANCE = 1e-4
"""Largest allowed difference of an output in fp32; of logits over a vocabulary, as a share of the largest one."""

STEPS = 32
"""Tokens that are read one by one with the cache."""

FEW = 4
"""Texts that are read together."""


@dataclass(frozen=True)
class TextParity:
    """How near the logits of a graph with a cache are to its model's: of whole texts, and with the cache.

    difference: the largest absolute one. scale: the largest absolute logit. agreement: the share of tokens at which
    both have the same most probable next token.
    """

    difference: float
    scale: float
    agreement: float


@torch.inference_mode()
def parity(model: Any, exported: OnnxModel, batches: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Return the largest absolute difference between each output of both, by name, over real batches.

    Raises NotFiniteError when outputs of one of them contain NaN or inf: no difference would say how far they are.
    """
    worst = dict.fromkeys(exported.outputs, 0.0)
    for batch in batches:
        found, copied = model(**model_inputs(model, batch)), vars(exported(**model_inputs(exported, batch)))
        for name in exported.outputs:
            own, graph = found[name].float(), copied[name].float()
            check_finite(own, "the model")
            check_finite(graph, "the exported graph")
            worst[name] = max(worst[name], float((own - graph).abs().max()))
    return worst


@torch.inference_mode()
def text_parity(model: Any, exported: OnnxDecoder, texts: Sequence[Sequence[int]]) -> TextParity:
    """Compare the logits of a causal language model with its graph's.

    texts: ids, none empty. Their logits are compared in one pass, in batches padded on the right; then their beginnings
    are prompts, in batches padded on the left, which both continue with the model's most probable tokens.
    Raises NotFiniteError when logits of one of them contain NaN or inf.
    """
    found: list[tuple[float, float, float]] = []
    counts: list[int] = []

    def compare(own: np.ndarray, graph: np.ndarray) -> None:
        """Compare logits (n, vocabulary)."""
        check_finite(own, "the model")
        check_finite(graph, "the exported graph")
        same = (own.argmax(-1) == graph.argmax(-1)).mean()
        found.append((float(np.abs(own - graph).max()), float(np.abs(own).max()), float(same)))
        counts.append(len(own))

    positions = longest_input(model.config)
    most = None if positions is None else max(1, positions - STEPS)
    for start in range(0, len(texts), FEW):
        rows = texts[start : start + FEW]
        batch = _padded(rows)
        real = batch["attention_mask"].bool().numpy()
        own, graph = (np.asarray(one(**batch).logits.float()) for one in (model, exported))
        compare(own[real], graph[real])
        prompts = _padded([row[: min(max(1, len(row) // 2), most or len(row))] for row in rows], before=True)
        new, mask = prompts["input_ids"].numpy(), prompts["attention_mask"].numpy()
        steps = STEPS if positions is None else min(STEPS, positions - new.shape[1])
        size = len(rows), new.shape[1] + steps
        begun = (TorchText(model, *size), exported.text(*size))
        for _ in range(1 + steps):
            own, graph = (text.read(new, mask)[:, -1].astype(np.float32) for text in begun)
            compare(own, graph)
            new = own.argmax(-1)[:, None]
            mask = np.ones_like(new)
    differences, scales, same = zip(*found, strict=True)
    return TextParity(max(differences), max(scales), float(np.average(same, weights=counts)))


def _padded(rows: Sequence[Sequence[int]], *, before: bool = False) -> dict[str, Tensor]:
    """Return ids and mask of rows, padded with 0 after or before them."""
    longest = max(map(len, rows))
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    if before:
        ids, mask = (
            torch.stack([line.roll(longest - len(row)) for line, row in zip(table, rows, strict=True)])
            for table in (ids, mask)
        )
    return {"input_ids": ids, "attention_mask": mask}
