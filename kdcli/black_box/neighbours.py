"""Words near a word in a model's own embedding table: synonyms without a dictionary, roughly."""

import hashlib
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHORTEST = 3
"""Words of fewer letters are mostly particles, whose neighbours change the grammar."""


class EmbeddingNeighbours:
    """For a word that is a single token, the `count` whole words with the most similar embeddings (cosine).

    Words are plain letters, from three on. An embedding knows what a word is used like, not what it means: opposites
    can be neighbours, so this is no dictionary.
    """

    @torch.no_grad()
    def __init__(self, model: "PreTrainedModel", tokenizer: Any, count: int = 5) -> None:
        self.count = count
        embedding = model.get_input_embeddings()
        # Called, not read: the table may be kept as two factors.
        device = next(embedding.parameters()).device
        table = embedding(torch.arange(len(tokenizer), device=device)).detach().float().cpu()
        texts = [tokenizer.decode([i]).strip() for i in range(len(tokenizer))]
        plain = [i for i, text in enumerate(texts) if text.isalpha() and len(text) >= SHORTEST]
        # The space makes a word begin, for tokenizers that tell beginnings from continuations.
        parts = tokenizer([f" {texts[i]}" for i in plain], add_special_tokens=False)["input_ids"] if plain else []
        whole = [i for i, ids in zip(plain, parts, strict=True) if ids == [i]]
        self.words = [texts[i] for i in whole]
        self.place = {word: row for row, word in enumerate(self.words)}
        self.vectors = torch.nn.functional.normalize(table[whole], dim=-1)
        self._known: dict[str, list[str]] = {}
        digest = hashlib.sha256(repr((count, self.words)).encode())
        digest.update(self.vectors.contiguous().numpy().tobytes())
        self.identity = digest.hexdigest()[:16]

    def __call__(self, word: str) -> list[str]:
        """Return the nearest words, the nearest first; none for a word that is no single token."""
        row = self.place.get(word, self.place.get(word.lower()))
        if row is None:
            return []
        if word not in self._known:
            likeness = self.vectors @ self.vectors[row]
            likeness[row] = -2.0
            best = likeness.topk(min(self.count, len(self.words) - 1)).indices.tolist()
            self._known[word] = [self.words[i] for i in best]
        return self._known[word]
