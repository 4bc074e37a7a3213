"""Masked language modelling: plain text, of which a model predicts the masked tokens."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from kdcli.errors import InputError, cut
from kdcli.models.heads import Head
from kdcli.recipe.schema import Fraction, NonNegativeFloat
from kdcli.tasks.kind import Encoded
from kdcli.tasks.plain_text import PlainText, PlainTextFields
from kdcli.words import counted

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from torch import Tensor

    from kdcli.signals import Prediction
    from kdcli.tasks.base import Task

FEW = 8
"""Texts with masks that are answered at a time."""

MASKED_LM = Head(
    "masked-lm",
    "a masked language model",
    "predicting masked tokens",
    "AutoModelForMaskedLM",
    ("ForMaskedLM", "ForPreTraining"),
    "fill-mask",
    unlike=("ElectraForPreTraining",),
)


class MaskingFields(PlainTextFields):
    """The column of text, and how many of its tokens are masked."""

    mask_probability: Fraction = Field(default=0.15, description="Share of the tokens that are masked.")
    mask_smoothing: NonNegativeFloat = Field(
        default=0.0,
        description="Mask tokens in proportion to their frequency to the power of minus this, so that rare ones are "
        "masked more often. 0 masks all alike; DistilBERT uses 0.7.",
    )


class MaskedLM(PlainText):
    """Plain text in blocks; some tokens are masked, others in every epoch."""

    name = "text"
    title = "plain text, of which tokens are masked"
    head = MASKED_LM
    fields = MaskingFields
    provides = frozenset({"vocabulary"})
    metrics = usual_metrics = ("loss",)
    scored_by_loss = general = True
    answer = "words"
    ranks = True
    inputs_change = True

    def check(self, task: "Task", processor: Any, max_length: int) -> None:
        import torch

        from kdcli.tasks.packing import Masker

        Masker(processor, **_masking(task.fields), seed=0, counts=torch.ones(len(processor)))
        super().check(task, processor, max_length)

    def collator(self, processor: Any) -> "Callable[[list[dict[str, Any]]], dict[str, Tensor]]":
        """Return the function from blocks whose tokens are masked already to a batch."""
        from kdcli.tasks.packing import TextCollator

        return TextCollator(processor)

    def prepare(self, task: "Task", processor: Any, max_length: int, *, seed: int = 0) -> Encoded:
        """Return blocks: those of training are masked when they are collated, the held-out ones once and for all."""
        from kdcli.tasks.packing import Masker, TextCollator, mask_once, token_counts

        train, held = (self.feed(rows, processor, max_length) for rows in (task.train, task.selection))
        masking = _masking(task.fields)
        counts = token_counts(train, len(processor)) if masking["smoothing"] > 0 else None
        masker = Masker(processor, **masking, seed=seed, counts=counts)
        # The held-out tokens that are masked are the same for every model and every seed.
        held = mask_once(held, Masker(processor, **masking, seed=0, counts=counts))
        return Encoded(train, held, TextCollator(processor, masker))

    def drawn(self, fields: Any) -> dict[str, Any]:
        return fields.model_dump(include={"mask_probability", "mask_smoothing"})

    def positions(self, batch: "Mapping[str, Tensor]", *, everywhere: bool = False) -> "Tensor":
        """Return the masked positions, or all real ones."""
        return batch["real_positions" if everywhere else "masked_positions"]

    def predictions(
        self, output: Any, batch: "Mapping[str, Tensor]", *, everywhere: bool = False
    ) -> "list[Prediction]":
        """Return one table with a row a masked token, or a real one, over the vocabulary."""
        from kdcli.objectives.distribution import row_weights
        from kdcli.signals import Prediction

        positions, masked = self.positions(batch, everywhere=everywhere), batch["masked_positions"]
        shape = batch["labels"].shape
        logits = output.logits.flatten(0, 1)
        if len(logits) != len(positions):
            logits = logits[positions]
        weights, target = row_weights(positions, *shape), batch["labels"].flatten()[masked]
        if not everywhere:
            return [Prediction(logits, weights, target)]
        return [Prediction(logits, weights, target, batch["masked_among_real"], row_weights(masked, *shape))]

    # Texts with masks in them

    def replies(
        self, model: Any, rows: "Dataset", processor: Any, *, top: int | None = None, **options: Any
    ) -> list[dict[str, Any]]:
        """Return the most probable word at each mask of each text, and the text with them.

        A mask is written as [MASK], or as the tokenizer writes it. Raises InputError for a text without any.
        """
        import numpy as np

        from kdcli.data.rows import values_of
        from kdcli.tasks.encode import Collator, encode
        from kdcli.tasks.replies import softmax

        mask, length, ask = processor.mask_token, options.pop("max_length"), options.pop("ask")
        texts = [text.replace("[MASK]", mask) for text in values_of(rows, "text")]
        features = encode(rows.remove_columns("text").add_column("text", texts), processor, length)
        found = []
        # A table over the vocabulary for each token is large: that of a few rows at a time.
        for start in range(0, len(features), FEW):
            part = features.select(range(start, min(start + FEW, len(features))))
            logits = ask(model, part, Collator(processor), outputs=self.head.outputs, per_token=True, **options)[
                "logits"
            ]
            for text, ids, table in zip(texts[start:], part["input_ids"], logits, strict=False):
                places = np.flatnonzero(np.array(ids) == processor.mask_token_id)
                if not len(places):
                    raise InputError(
                        f"no {mask} within {counted(length, 'token')} of {cut(repr(text))}",
                        hint=f"write {mask} where a word is to be predicted",
                    )
                found.append(_filled(text, softmax(table[places]), processor, top))
        return found

    def show(self, reply: dict[str, Any]) -> str:
        pairs = zip(reply["words"], reply["probabilities"], strict=True)
        return ", ".join(f"{word} {probability:.3f}" for word, probability in pairs)


def _filled(text: str, shares: "np.ndarray", processor: Any, top: int | None) -> dict[str, Any]:
    """Return the reply to a text. shares: (masks, vocabulary)."""
    best, numbers = [], (-shares).argsort(axis=1, kind="stable")[:, : top or 1]
    for mask, (row, ids) in enumerate(zip(shares, numbers, strict=True), 1):
        best += [{"mask": mask, "word": processor.decode([i]).strip(), "probability": float(row[i])} for i in ids]
    first = best[:: numbers.shape[1]]
    for entry in first:
        text = text.replace(processor.mask_token, entry["word"], 1)
    words = {
        name: [entry[key] for entry in first] for name, key in (("words", "word"), ("probabilities", "probability"))
    }
    return {**words, "text": text, **({"top": best} if top is not None else {})}


def _masking(fields: MaskingFields) -> dict[str, float]:
    return {"probability": fields.mask_probability, "smoothing": fields.mask_smoothing}


KIND = MaskedLM()


def batch_masked_at(rows: Sequence[Mapping[str, Any]], places: Sequence[int], processor: Any) -> "dict[str, Tensor]":
    """Return a batch of rows in which one token each is masked already, with one prediction a row.

    rows: `index` and a model's inputs; places: of the mask in each. The labels there are the masks themselves.
    """
    from kdcli.tasks.packing import IGNORED, TextCollator

    masked = []
    for row, place in zip(rows, places, strict=True):
        labels = [IGNORED] * len(row["input_ids"])
        labels[place] = row["input_ids"][place]
        masked.append({**row, "labels": labels})
    return TextCollator(processor)(masked)
