"""Graphs by the model builder of ONNX Runtime GenAI: fewer and larger operators, and weights of 16, 8 or 4 bits.

Source: https://github.com/microsoft/onnxruntime-genai, `onnxruntime_genai.models.builder`, version 0.18.
"""

import copy
import importlib.util
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kdcli.errors import InputError, RunError
from kdcli.faults import writing
from kdcli.models.heads import CAUSAL_LM, Head
from kdcli.models.lowrank import merge_low_rank
from kdcli.models.save import save_config, save_model, save_processor, structure_of
from kdcli.models.shape import longest_input, shape_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Builder = Literal["auto", "genai", "kdcli"]
Precision = Literal["fp32", "fp16", "int8", "int4"]

MODULE = "onnxruntime_genai.models.builder"
"""It is run as a program: its own modules are found only from its own folder."""

OPSET = 23
"""The first one with an operator for attention over grouped heads."""

EXTRA = "install it: pip install 'kdcli[llm]'"

MULTIPLE = 16
"""What the operator of grouped attention needs head sizes to be multiples of."""

PROVIDERS: dict[Precision, str] = {"fp32": "cpu", "fp16": "cuda", "int8": "cpu", "int4": "cpu"}
"""The processor that a graph is made for. One of 16 bits is for a GPU; it runs on the CPU, too, and is slow there."""


def _source() -> Path | None:
    """Return where the builder's code is; None where the package is not installed."""
    found = importlib.util.find_spec("onnxruntime_genai")
    if found is None or not found.submodule_search_locations:
        return None
    path = Path(found.submodule_search_locations[0], "models", "builder.py")
    return path if path.is_file() else None


def window_of(config: "PretrainedConfig") -> int | None:
    """Return how many tokens some block attends to at most; None where all attend to every token before them."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if window is None or (kinds is not None and "sliding_attention" not in kinds):
        return None
    positions = longest_input(config)
    return window if positions is None or window < positions else None


def obstacle(model: "PreTrainedModel") -> tuple[str, str | None] | None:
    """Return why the builder makes no graph of a model, and a hint; None where it does."""
    if (window := window_of(model.config)) is not None:
        reason = f"the builder of ONNX Runtime GenAI does not keep to the window of {window} tokens that the model has"
        return reason, "kdcli's own graph does, in fp32"
    source = _source()
    if source is None:
        return "ONNX Runtime GenAI is not installed", EXTRA
    name = type(model).__name__
    # It compares the configuration's architecture with the names of the classes that it knows.
    if f'"{name}"' not in source.read_text(encoding="utf-8"):
        return f"the builder of ONNX Runtime GenAI does not know {name}", None
    if (size := shape_of(model.config).head) % MULTIPLE:
        return f"the builder of ONNX Runtime GenAI needs head sizes that are multiples of {MULTIPLE}, not {size}", None
    return None


@dataclass(frozen=True)
class Form:
    """How a graph is made. where: how messages name one of its fields.

    builder: "auto" takes that of ONNX Runtime GenAI where it can make a graph, but for low-rank factors in fp32, which
    kdcli's own graph keeps; in fp32 kdcli's own exporter takes its place where it fails. precision: of the weights.
    Both are for causal language models alone.
    """

    opset: int = 23
    builder: Builder = "auto"
    precision: Precision = "fp32"
    where: str = "--{}"

    def by_builder(self, model: "PreTrainedModel", head: Head) -> bool:
        """Return whether the builder makes the graph of a model. Raises InputError where it cannot have this form."""
        if head != CAUSAL_LM:
            return self._check_plain(head)
        if self.opset < OPSET:
            raise self._error("opset", f"a graph with a key-value cache needs opset {OPSET}, not {self.opset}")
        if self.builder == "kdcli":
            if self.precision != "fp32":
                hint = f"leave out {self.where.format('builder')}"
                raise self._error("precision", f"kdcli's own graph is of fp32, not {self.precision}", hint)
            return False
        reason = obstacle(model)
        if self.builder == "auto" and self.precision == "fp32":
            return reason is None and not structure_of(model)
        if reason is not None:
            raise self._error("builder" if self.builder == "genai" else "precision", *reason)
        return True

    def _check_plain(self, head: Head) -> bool:
        for name, value in (("builder", self.builder), ("precision", self.precision)):
            if value not in ("auto", "kdcli", "fp32"):
                raise self._error(name, f"{value} is for causal language models, and this is {head.title}")
        return False

    def _error(self, name: str, message: str, hint: str | None = None) -> InputError:
        return InputError(message, where=self.where.format(name), hint=hint)


def build(model: "PreTrainedModel", tokenizer: Any, folder: Path, *, precision: Precision = "fp32") -> list[str]:
    """Write model.onnx, config.json, genai_config.json and the tokenizer into `folder`; return notes.

    model: on the CPU in fp32, as of `plain_copy`; its low-rank factors are merged in a copy, since the builder knows
    dense matrices alone. Raises RunError with its own last words when the builder fails.
    """
    notes = []
    if structure_of(model):
        model = copy.deepcopy(model)
        merge_low_rank(model)
        notes.append("low-rank factors are merged into dense matrices, the only ones that the builder knows")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work, writing(folder):
        source = Path(work, "model")
        source.mkdir()
        save_model(model, source, tokenizer)
        options = ["-i", source, "-o", folder, "-p", precision, "-e", PROVIDERS[precision], "-c", Path(work, "cache")]
        found = subprocess.run(
            [sys.executable, "-m", MODULE, *map(str, options)], capture_output=True, text=True, errors="replace"
        )
    if found.returncode:
        last = (found.stderr.strip() or found.stdout.strip() or "it gives no reason").splitlines()[-1]
        raise RunError(f"ONNX Runtime GenAI cannot build {type(model).__name__}: {last}", hint="use --builder kdcli")
    save_config(model.config, folder)
    save_processor(tokenizer, folder, model.config)
    return notes
