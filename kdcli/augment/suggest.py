"""Asking a masked language model which words could stand in place of those in a task's rows, for copies of them.

Every word of a sentence is masked once by itself, the sentence's other words in place, and the model's most likely
words there become its candidates. A word of several word-pieces gives way to one single mask. (TinyBERT takes the
nearest GloVe vectors there; kdcli ships none: they are a download as large as the model, for one language, and the
mask asks for the same thing.) The teacher itself is never fine-tuned on copies.
Source: Jiao et al. 2020 (TinyBERT), algorithm 1.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from kdcli.augment.copies import MODEL, NONE, Vocabulary, words_of
from kdcli.augment.stop_words import is_stop_word
from kdcli.files import cache_dir, fingerprint
from kdcli.models.capture import Capture
from kdcli.models.finite import check_finite
from kdcli.models.hashing import hash_of_model, hash_of_tokenizer
from kdcli.models.shape import longest_input
from kdcli.signals import Request
from kdcli.tasks.masked_lm import KIND, batch_masked_at
from kdcli.tensor_file import keep_tensors, kept_tensors
from kdcli.terminal import tell
from kdcli.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel


CHUNK = 256
"""Sentences a file of the cache: what an interruption costs at most."""


def _of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@dataclass
class Suggester:
    """A masked language model that predicts what else could stand in place of each word of a sentence.

    max_length: tokens of a sentence that are read; words after them have no candidates. stop_words: that have none
    either, as `normal` writes them.
    """

    model: "PreTrainedModel"
    tokenizer: Any
    top_k: int
    batch_size: int
    max_length: int
    precision: str
    device: torch.device
    console: Console | None = None
    stop_words: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.vocabulary = Vocabulary(self.tokenizer)
        self.mask = self.tokenizer.mask_token
        longest = longest_input(self.model.config)
        self.max_length = min(self.max_length, self.tokenizer.model_max_length, longest or self.max_length)
        self.folder = (
            cache_dir()
            / "augment"
            / fingerprint(
                {
                    "model": hash_of_model(self.model),
                    "tokenizer": hash_of_tokenizer(self.tokenizer),
                    "top_k": self.top_k,
                    "max_length": self.max_length,
                    "precision": self.precision,
                    "stop_words": sorted(self.stop_words),
                    "format": 3,
                }
            )
        )

    def asked_about(self, sentences: list[str]) -> list[int]:
        """Return which of the sentences' words, numbered through all of them, are no stop words."""
        words = [text[start:end] for text in sentences for start, end in words_of(text)]
        return [number for number, word in enumerate(words) if not is_stop_word(word, self.stop_words)]

    def path(self, sentences: list[str]) -> Path:
        """Return the file that keeps the candidates for these sentences, in this order."""
        return self.folder / f"{fingerprint(sentences)}.safetensors"

    def kept(self, sentences: list[str]) -> Tensor | None:
        """Return the candidates that the cache holds for these sentences, or None."""
        path = self.path(sentences)
        shapes = {"candidates": (sum(len(words_of(text)) for text in sentences), self.top_k)}
        found = kept_tensors(path, shapes, of=_of(path), console=self.console)
        return found["candidates"] if found is not None else None

    def ask(self, sentences: list[str]) -> Tensor:
        """Return (words, top_k) token ids, the likeliest first, -1 where there are no more; int32.

        Rows are the words of the first sentence, then those of the second, and so on. What the cache holds is not
        asked again, and what is asked goes into the cache.
        """
        if (found := self.kept(sentences)) is not None:
            return found
        return self.make(sentences)

    def make(self, sentences: list[str]) -> Tensor:
        """Ask the model, whatever the cache holds, and cache its candidates."""
        candidates = self._candidates(sentences)
        path = self.path(sentences)
        keep_tensors(path, {"candidates": candidates}, of=_of(path))
        return candidates

    @torch.inference_mode()
    def _candidates(self, sentences: list[str]) -> Tensor:
        places = [(text, start, end) for text in sentences for start, end in words_of(text)]
        candidates = torch.full((len(places), self.top_k), NONE, dtype=torch.int32)
        asked = self.asked_about(sentences)
        if not asked:
            return candidates
        encoded = self.tokenizer(
            [text[:start] + self.mask + text[end:] for text, start, end in (places[number] for number in asked)],
            truncation=True,
            max_length=self.max_length,
        )
        rows = []
        for row_number, number in enumerate(asked):
            text, start, _ = places[number]
            ids = encoded["input_ids"][row_number]
            masks = [i for i, token in enumerate(ids) if token == self.tokenizer.mask_token_id]
            # A text may hold masks of its own.
            before = text[:start].count(self.mask)
            if before < len(masks):
                names = ("input_ids", "attention_mask", "token_type_ids")
                row = {name: encoded[name][row_number] for name in names if name in encoded}
                rows.append(({**row, "index": number}, masks[before]))
        rows.sort(key=lambda row: -len(row[0]["input_ids"]))
        self.model.to(self.device)  # type: ignore[arg-type]
        capture = Capture(self.model, Request(logits=True), KIND)
        try:
            for start in range(0, len(rows), self.batch_size):
                part, masks = zip(*rows[start : start + self.batch_size], strict=True)
                numbers = [row["index"] for row in part]
                batch = batch_masked_at(part, masks, self.tokenizer)
                best = self._best(capture, batch, [places[number] for number in numbers])
                candidates[numbers, : best.shape[1]] = best
        finally:
            capture.close()
        return candidates

    def _best(self, capture: Capture, batch: dict[str, Tensor], places: list[tuple[str, int, int]]) -> Tensor:
        batch = {name: values.to(self.device) for name, values in batch.items()}
        with capture, torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            (table,) = capture.run(batch).predictions
        logits = table.logits
        check_finite(logits.float().cpu(), MODEL)
        words = self.vocabulary
        # A model's table may have more rows than the tokenizer has tokens.
        scores = logits.float()[:, : len(words.texts)]
        spaced = torch.tensor([start > 0 and text[start - 1].isspace() for text, start, _ in places])
        allowed = torch.where(spaced[:, None], words.spaced, words.tight)
        for i, (text, start, end) in enumerate(places):
            allowed[i, words.same.get(text[start:end].casefold(), [])] = False
        scores = scores.masked_fill(~allowed.to(self.device), -torch.inf)
        values, best = scores.topk(min(self.top_k, scores.shape[1]))
        return torch.where(values > -torch.inf, best, NONE).to("cpu", torch.int32)


def fill_cache(suggester: Suggester, sentences: list[str], name: str, console: Console) -> None:
    """Keep the candidates for all sentences. name: of the model, for the user."""
    missing = [chunk for chunk in chunks_of(sentences) if suggester.kept(chunk) is None]
    if not missing:
        return
    count = sum(len(suggester.asked_about(chunk)) for chunk in missing)
    tell(console, f"augment: {name} fills in {counted(count, 'masked word')}")
    told = time.monotonic()
    chunks = track(missing, "augment", console=console, disable=not console.is_terminal, transient=True)
    for done, chunk in enumerate(chunks, 1):
        suggester.make(chunk)
        if not console.is_terminal and time.monotonic() - told > 60:
            told = time.monotonic()
            tell(console, f"augment: {done / len(missing):.0%}")


def chunks_of(sentences: list[str]) -> Iterator[list[str]]:
    """Yield the sentences in the parts that candidates are kept in."""
    for start in range(0, len(sentences), CHUNK):
        yield sentences[start : start + CHUNK]


def by_sentence(sentences: list[str], candidates: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield each sentence with the candidates for its words, (words, top_k)."""
    first = 0
    for text in sentences:
        count = len(words_of(text))
        yield text, candidates[first : first + count]
        first += count
