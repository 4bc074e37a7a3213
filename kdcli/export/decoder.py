"""An exported causal language model: its logits, and the text that it writes with its cache."""

from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcli.export.decoder_graph import PAST, PRESENT
from kdcli.export.session import OnnxModel
from kdcli.models.shape import shape_of

GENAI = "genai_config.json"
"""What ONNX Runtime GenAI reads beside a graph of its model builder."""


class OnnxDecoder(OnnxModel):
    """An ONNX folder with a key-value cache; it generates as PyTorch models of the library do.

    Two kinds of graphs are run. kdcli's own take the positions of tokens, and return a cache that is longer by the new
    tokens; batches are padded on the left. Those of ONNX Runtime GenAI's model builder write new keys and values into
    a cache that is as long as the text may become, behind those of each row, and count positions by the real tokens
    of the attention mask; batches are padded on the right.
    """

    device = torch.device("cpu")

    def __init__(self, folder: Path, *, threads: int | None = None, session: Any = None) -> None:
        super().__init__(folder, threads=threads, session=session)
        self.outputs = [name for name in self.outputs if not name.startswith(PRESENT)]
        self.cache = {node.name: node for node in self.session.get_inputs() if node.name.startswith(PAST)}
        self.in_place = (folder / GENAI).is_file()

    @cached_property
    def cache_sizes(self) -> dict[str, tuple[int, int]]:
        """Heads and head size of each input of the cache."""
        # The builder gives the size a name in its graphs.
        size = shape_of(self.config).head if self.in_place else None
        return {name: (node.shape[1], size or node.shape[3]) for name, node in self.cache.items()}

    @cached_property
    def cache_type(self) -> Any:
        """The NumPy type of keys and values."""
        node = next(iter(self.cache.values()))
        return np.float16 if node.type == "tensor(float16)" else np.float32

    def __call__(self, **inputs: Tensor) -> SimpleNamespace:
        """Return the logits (batch, seq, vocabulary) of whole texts, padded on either side."""
        ids, mask = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy()
        return SimpleNamespace(logits=torch.from_numpy(self.text(*ids.shape).read(ids, mask, every=True)))

    def text(self, rows: int, room: int) -> "Text":
        """Return the empty cache of a batch of texts. room: tokens of the longest that there will be, with padding."""
        return (_TextInPlace if self.in_place else _GrowingText)(self, rows, room)

    @torch.no_grad()
    def generate(
        self, *, input_ids: Tensor, attention_mask: Tensor, generation_config: Any, logits_processor: Any
    ) -> Tensor:
        """Return prompts (padded on the left) and what follows them, as the library's models do with the same names.

        The most probable token is taken; a processor may leave only one. generation_config: its `max_new_tokens`,
        `eos_token_id` and `pad_token_id` are read.
        """
        most, pad = generation_config.max_new_tokens, generation_config.pad_token_id
        end = torch.tensor(generation_config.eos_token_id or [])
        rows, width = input_ids.shape
        text = self.text(rows, width + most)
        logits = text.read(input_ids.numpy(), attention_mask.numpy())
        done = torch.zeros(rows, dtype=torch.bool)
        for step in range(most):
            scores = logits_processor(input_ids, torch.from_numpy(logits[:, -1]).float())
            token = torch.where(done, pad, scores.argmax(-1))
            input_ids = torch.cat([input_ids, token[:, None]], dim=1)
            done |= torch.isin(token, end)
            if bool(done.all()) or step + 1 == most:
                break
            logits = text.read(token[:, None].numpy(), np.ones((rows, 1), np.int64))
        return input_ids


class Text(ABC):
    """What a decoder has read of a batch of texts: its cache, which stays where ONNX Runtime keeps it."""

    def __init__(self, decoder: OnnxDecoder, rows: int, room: int) -> None:
        self.decoder = decoder
        self.mask = np.zeros((rows, 0), np.int64)
        self.binding = decoder.session.io_binding()
        self.binding.bind_output("logits", "cpu")
        for name, (heads, size) in decoder.cache_sizes.items():
            self._bind(name, (rows, heads, room, size))

    @abstractmethod
    def _bind(self, name: str, shape: tuple[int, ...]) -> None:
        """Bind an input of the cache. shape: with room for the longest text."""

    @abstractmethod
    def read(self, ids: np.ndarray, mask: np.ndarray, *, every: bool = False) -> np.ndarray:
        """Return the logits at the last token of each text (batch, 1, vocabulary), or at every one of `ids`.

        ids: the next tokens (batch, new). mask: 1 where they are real; when the first are read, padding may stand
        before them (or, with `every`, after them), and later there is none.
        """

    def _run(self, ids: np.ndarray, positions: np.ndarray, kept: np.ndarray) -> list[Any]:
        """Return the outputs of one run, logits first. kept: the places of `ids` whose logits are wanted."""
        feed = {"input_ids": ids, "attention_mask": self.mask, "position_ids": positions, "logits_to_keep": kept}
        for name, values in feed.items():
            if name in self.decoder.inputs:
                self.binding.bind_cpu_input(name, np.ascontiguousarray(values, np.int64))
        self.binding.bind_output("logits", "cpu")
        with self.decoder.running():
            self.decoder.session.run_with_iobinding(self.binding)
        return self.binding.get_outputs()


class _GrowingText(Text):
    """Padding before a text stays in the cache, and the mask leaves it out."""

    def _bind(self, name: str, shape: tuple[int, ...]) -> None:
        empty = np.zeros((*shape[:2], 0, shape[3]), self.decoder.cache_type)
        self.binding.bind_cpu_input(name, empty)
        self.binding.bind_output(_present(name), "cpu")

    def read(self, ids: np.ndarray, mask: np.ndarray, *, every: bool = False) -> np.ndarray:
        new = ids.shape[1]
        self.mask = np.concatenate([self.mask, mask], axis=1)
        positions = (self.mask.cumsum(1) - 1).clip(min=0)[:, -new:]
        logits, *presents = self._run(ids, positions, np.arange(new) if every else np.array([new - 1]))
        for name, present in zip(self.decoder.cache, presents, strict=True):
            self.binding.bind_ortvalue_input(name, present)
            self.binding.bind_output(_present(name), "cpu")
        return logits.numpy()


class _TextInPlace(Text):
    """New tokens are written behind the real ones of each text; the mask is read as their number."""

    def _bind(self, name: str, shape: tuple[int, ...]) -> None:
        from onnxruntime import OrtValue

        cache = OrtValue.ortvalue_from_numpy(np.zeros(shape, self.decoder.cache_type))
        self.binding.bind_ortvalue_input(name, cache)
        self.binding.bind_ortvalue_output(_present(name), cache)

    def read(self, ids: np.ndarray, mask: np.ndarray, *, every: bool = False) -> np.ndarray:
        # Real tokens first: what follows them is overwritten by the next ones.
        order = np.argsort(1 - mask, axis=1, kind="stable")
        before, new = self.mask.sum(1, keepdims=True), mask.sum(1, keepdims=True)
        length = max(int((before + new).max()), ids.shape[1])
        self.mask = (np.arange(length) < before + new).astype(np.int64)
        places = np.arange(ids.shape[1])
        logits = self._run(np.take_along_axis(ids, order, axis=1), before + places, places)[0].numpy()
        if not every:
            return np.take_along_axis(logits, new[:, :, None] - 1, axis=1)
        found = np.empty_like(logits)
        np.put_along_axis(found, order[:, :, None], logits, axis=1)
        return found


def _present(name: str) -> str:
    return PRESENT + name.removeprefix(PAST)


def open_graph(folder: Path, *, threads: int | None = None) -> OnnxModel:
    """Return the session of an exported folder, with a cache where its graph has one; as `OnnxModel` otherwise."""
    model = OnnxModel(folder, threads=threads)
    if not any(name.startswith(PAST) for name in model.inputs):
        return model
    return OnnxDecoder(folder, session=model.session)
