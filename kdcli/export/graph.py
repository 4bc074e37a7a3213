"""From a PyTorch model to an ONNX graph."""

import contextlib
import copy
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdcli.errors import RunError
from kdcli.export.decoder_graph import DecoderFunction, arguments, graph_attention, names_of
from kdcli.export.session import MODEL
from kdcli.faults import writing
from kdcli.models.families import family_of
from kdcli.models.inputs import inputs_of
from kdcli.models.overparam import contract_model
from kdcli.models.probe import probe_batch
from kdcli.models.save import save_config, save_processor
from kdcli.models.shape import both_sides, longest_input, shape_of, takes_any_size
from kdcli.tensors.parametrization import is_overparameterised

if TYPE_CHECKING:
    from transformers import PreTrainedModel


INTERPOLATE = "interpolate_pos_encoding"
"""What forward passes call the interpolation of positions; a model without it interpolates them in any case."""


class ImageModel:
    """A PyTorch model of images, called as its graph is: with images of every size, where it takes any."""

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model = model
        self.config = model.config

    def __call__(self, pixel_values: Tensor) -> Any:
        return self.model(pixel_values=pixel_values, **_interpolated(self.model))


def _interpolated(model: "PreTrainedModel") -> dict[str, bool]:
    """Return what a forward pass has to be told for images of another size than the model's own."""
    if not takes_any_size(model.config):
        return {}
    # A part of a whole is told by what its classifier hands on to it.
    named = INTERPOLATE in inspect.signature(type(model).forward).parameters
    return {INTERPOLATE: True} if named or family_of(model.config).part_of is not None else {}


class _Function(nn.Module):
    """The model as a function from plain tensors to the tensors of its outputs."""

    def __init__(self, model: "PreTrainedModel", names: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.outputs = outputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, inputs, strict=True))
        if family_of(self.model.config).rotary:
            # ONNX rotates by the angles of each row, where the library has one row of them for all.
            batch, sequence = given["input_ids"].shape
            given["position_ids"] = torch.arange(sequence).expand(batch, sequence)
        found = self.model(**given, **_interpolated(self.model))
        return tuple(found[name] for name in self.outputs)


def input_names(model: "PreTrainedModel", processor: Any) -> list[str]:
    """Return the inputs that both processor and model know."""
    optional = {"token_type_ids"} - set(processor.model_input_names)
    return [name for name in inputs_of(model.config) if name not in optional]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def plain_copy(model: "PreTrainedModel") -> "PreTrainedModel":
    """Return a copy for export: on the CPU, fp32, eval mode, contracted if it was over-parameterised."""
    model = copy.deepcopy(model).to("cpu").float().eval()  # type: ignore[arg-type]
    model.config.dtype = torch.float32
    if is_overparameterised(model):
        contract_model(model, check=False)
    return model


def export_onnx(
    model: "PreTrainedModel",
    processor: Any,
    folder: Path,
    *,
    opset: int = 23,
    outputs: Sequence[str] = ("logits",),
) -> Path:
    """Write model.onnx, config.json and the processor into `folder`, and return the graph's path.

    outputs: those of the model's head, by their names in a forward pass. The batch is dynamic, and so is the sequence
    of a text, and the size of an image where `takes_any_size`. The given model is not changed; an over-parameterised
    one is contracted in a copy first.
    Raises RunError when the exporter or onnx.checker refuses the graph.
    """
    model = plain_copy(model)
    names = input_names(model, processor)
    values, dynamic = _images(model) if family_of(model.config).reads == "images" else _texts(model)
    return _write(
        model,
        processor,
        folder,
        _Function(model, names, outputs),
        tuple(values[name] for name in names),
        opset=opset,
        names=(names, list(outputs)),
        dynamic={"inputs": tuple(dynamic for _ in names)},
    )


def _texts(model: "PreTrainedModel") -> tuple[dict[str, Tensor], dict[int, Any]]:
    """Return inputs to trace a model of texts with, and which of their sizes are dynamic."""
    ids = torch.randint(5, model.config.vocab_size, (2, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    longest = longest_input(model.config) or shape_of(model.config).max_positions
    return values, {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("sequence", min=1, max=longest)}


def _images(model: "PreTrainedModel") -> tuple[dict[str, Tensor], dict[int, Any]]:
    """Return the same for a model of images."""
    pixels = other_size(model) if takes_any_size(model.config) else probe_batch(model)["pixel_values"][:2]
    sizes = {2: "height", 3: "width"} if takes_any_size(model.config) else {}
    return {"pixel_values": pixels}, {0: "batch", **sizes}


def other_size(model: "PreTrainedModel") -> Tensor:
    """Return random images of another size than the model's own, for one that `takes_any_size`.

    Height and width differ from it and from each other by patches: the exporter takes what is equal for the same.
    """
    shape = shape_of(model.config)
    assert shape.image is not None and shape.patch is not None
    height, width = (
        side + (number + 1) * patch
        for number, (side, patch) in enumerate(zip(both_sides(shape.image), both_sides(shape.patch), strict=True))
    )
    return torch.randn(2, shape.channels or 3, height, width, generator=torch.Generator().manual_seed(0))


def export_decoder(model: "PreTrainedModel", processor: Any, folder: Path, *, opset: int = 23) -> Path:
    """Write model.onnx with a key-value cache (see `decoder_graph`), config.json and the processor into `folder`.

    Return the graph's path. model: a causal language model on the CPU, as of `plain_copy`. Raises RunError when the
    exporter or onnx.checker refuses the graph.
    """
    values, dynamic = arguments(model)
    with graph_attention(model):
        return _write(
            model,
            processor,
            folder,
            DecoderFunction(model),
            values,
            opset=opset,
            names=names_of(len(values[-1])),
            dynamic=dynamic,
        )


def _write(
    model: "PreTrainedModel",
    processor: Any,
    folder: Path,
    function: nn.Module,
    values: tuple[Any, ...],
    *,
    opset: int,
    names: tuple[list[str], list[str]],
    dynamic: dict[str, Any],
) -> Path:
    """Write a function of a model, traced with `values`, and the model's configuration and processor beside it.

    names: of its inputs and outputs. dynamic: their sizes that are.
    """
    import onnx

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MODEL
    try:
        with _quiet(), torch.no_grad(), writing(path):
            program = torch.onnx.export(
                function.eval(),
                values,
                dynamo=True,
                opset_version=opset,
                input_names=names[0],
                output_names=names[1],
                dynamic_shapes=dynamic,
            )
            assert program is not None
            program.save(str(path))
        onnx.checker.check_model(str(path), full_check=True)
    except OSError:
        raise
    except Exception as error:
        raise RunError(f"{type(model).__name__} cannot be exported: {str(error).splitlines()[0]}") from error
    save_config(model.config, folder)
    save_processor(processor, folder, model.config)
    return path


def operators(path: Path) -> dict[str, int]:
    """Return how often each operator occurs in a graph."""
    import onnx

    counts: dict[str, int] = {}
    for node in onnx.load(str(path), load_external_data=False).graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))
