"""What a training step needs in memory, told from the shapes of both models: nothing is run, and no weight is read."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from kdcli.distill.prepare import shape_only
from kdcli.distill.resolve import Resolved
from kdcli.distill.states import teacher_request
from kdcli.machine import computing_device, resolve_precision
from kdcli.methods.base import Stage
from kdcli.models.blocks import blocks_of
from kdcli.models.counts import count_parameters
from kdcli.models.families import family_of
from kdcli.models.lowrank import LowRankLinear
from kdcli.models.placement import bytes_of, placement_of
from kdcli.models.probe import probe_batch
from kdcli.models.shape import ModelShape, OuterShape, shape_of
from kdcli.models.sharding import units_of
from kdcli.objectives.rows import CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS
from kdcli.signals import Request
from kdcli.tensors.parametrization import chains_of, is_overparameterised
from kdcli.training.settings import LoopSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOAT, MOMENTS = 4, 2
"""Bytes of a number of what is trained, and how many moments AdamW keeps of each."""

ROWS = 6
"""Tables of a few rows of logits that a divergence holds at once: both models', their logarithms, and what is formed
of them."""

DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")


@dataclass(frozen=True)
class Memory:
    """What one of `processes` needs on its device for a training step, in bytes by part.

    tokens: of one process at once, or images, as `unit` says, of a model whose inside is not known. host: what it keeps
    in the CPU's memory beside that. sharded: whether processes hold a part of the student each. spread: of the
    teacher's blocks, which its device map puts elsewhere, or here, too, where it has no limit for this device.
    """

    processes: int
    sharded: bool
    tokens: int
    parts: dict[str, int] = field(default_factory=dict)
    host: int = 0
    spread: int = 0
    unit: str = "tokens"

    @property
    def total(self) -> int:
        """The sum of all parts: not all are there at the same moment, so that a step needs at most about this."""
        return sum(self.parts.values())


def memory_of_step(
    resolved: Resolved,
    loop: LoopSettings,
    stages: list[Stage],
    teacher: "PreTrainedModel | None",
    student: "PreTrainedModel",
    *,
    processes: int,
    sharded: bool,
) -> Memory:
    """Return what each of `processes` needs for a step of its part of a batch, all of its texts `max_length` long.

    An image has as many tokens as each model makes of it.

    teacher: None where none runs. student: as it is trained, with its chains. Both may be on the meta device.
    What a method generates, and tables that an objective forms of every two tokens, are not counted.
    """
    recipe = resolved.recipe
    rows = max(1, loop.batch_size // loop.gradient_accumulation // processes)
    longest = math.ceil(recipe.task.max_length / 8) * 8
    sizes = shape_of(student.config)
    length = 1 if isinstance(sizes, OuterShape) else sizes.tokens or longest
    tokens = rows * length
    half = resolve_precision(loop.precision, loop.device) == "bf16"
    element = 2 if half else FLOAT
    on_gpu = computing_device(loop.device) != "cpu"
    own, asked = _requests(stages)
    count = count_parameters(student)
    parts: Counter[str] = Counter()
    spread = 0
    if teacher is not None:
        parts["teacher weights"], spread = _teacher_weights(teacher, processes, loop.device)
        shape = shape_of(teacher.config)
        if not isinstance(shape, OuterShape):
            # One block at a time, and what is compared of all of them.
            width = _block_width(teacher, shape, 0, on_gpu, half) + _captured(asked, shape)
            parts["teacher's states"] = rows * (shape.tokens or longest) * element * width
    share = processes if sharded else 1
    halved = half and not is_overparameterised(student)
    parts["student weights"] = FLOAT * count // share
    parts["gradients"] = FLOAT * count // share
    parts["moments"] = MOMENTS * FLOAT * count // share
    if sharded:
        parts["gathered weights"] = _gathered(student, halved)
    elif processes > 1:
        parts["gradients in transit"] = FLOAT * count
    if half and not (sharded and halved):
        parts["weights in bf16"] = 2 * count
    if chains := sum(math.prod(shape.matrix) for shape, _ in chains_of(student)):
        # Contracted once a step; the products on the way are kept for the backward pass.
        parts["contracted chains"] = 2 * FLOAT * chains
    if loop.chain_learning_rate == "matched":
        parts["chains before a step"] = (
            FLOAT * sum(t.numel() for _, chain in chains_of(student) for t in chain) // share
        )
    parts["activations"] = tokens * element * _activations(student, length, loop.gradient_checkpointing, on_gpu, half)
    parts["logits"] = _logits(resolved, student, teacher, tokens, own, element, on_gpu)
    found = {name: int(size) for name, size in parts.items() if size}
    unit = "images" if isinstance(sizes, OuterShape) else "tokens"
    return Memory(processes, sharded, tokens, found, FLOAT * count * sharded, spread, unit)


def _requests(stages: list[Stage]) -> tuple[Request, Request]:
    """Return what all stages together ask of the student, and of the teacher."""
    own, asked = Request(), Request()
    for stage in stages:
        asked |= teacher_request(stage.terms)
        for term in stage.terms:
            if term.weight > 0:
                own |= term.objective.student_request()
    return own, asked


def _teacher_weights(teacher: "PreTrainedModel", processes: int, device: str) -> tuple[int, int]:
    """Return the bytes of a teacher's weights on the device of one process, and of those that a device map spreads.

    Sharded, a process has a part of each block, and a whole one while it runs. A device map without limits takes what
    is free when the teacher is loaded, which is not known: all blocks count as spread. device: `train.device`.
    """
    placement = placement_of(teacher)
    whole = sum(p.numel() * p.element_size() for p in teacher.parameters())
    if placement.sharded and processes > 1:
        blocks = [sum(p.numel() * p.element_size() for p in unit.parameters()) for unit in units_of(teacher)]
        return whole - sum(blocks) + sum(blocks) // processes + max(blocks, default=0), 0
    if placement.limits is None or device == "cpu":
        return whole, 0
    rest = whole - sum(p.numel() * p.element_size() for p in blocks_of(teacher).parameters())
    # The only process computes on the first GPU.
    here = max(rest, min(whole, bytes_of(placement.limits.get("0", "0GB"))))
    return here, whole - here


def _gathered(student: "PreTrainedModel", halved: bool) -> int:
    """Return the bytes of what is whole of a sharded student at once: all but its blocks, and two of them.

    Their gradients are whole, too, before they are shared out. halved: blocks are gathered in bf16.
    """
    blocks = [count_parameters(unit) for unit in units_of(student)]
    rest = count_parameters(student) - sum(blocks)
    return 2 * FLOAT * rest + 2 * (2 if halved else FLOAT) * sum(sorted(blocks)[-2:])


def _captured(request: Request, shape: ModelShape) -> int:
    """Return the numbers a token that are kept of a forward pass for objectives."""
    matrices = sum(shape.width_of(name) for _, name in request.matrices)
    linear = sum(shape.hidden + shape.width_of(name) for _, name in request.linear)
    return len(request.hidden) * shape.hidden + matrices + linear


def _activations(student: "PreTrainedModel", length: int, checkpointed: bool, on_gpu: bool, half: bool) -> int:
    """Return the numbers a token that are kept for the backward pass.

    With checkpoints that is the input of every block, and all of one block.
    """
    shape = shape_of(student.config)
    if isinstance(shape, OuterShape):
        return _kept_of_image(student)
    block = _block_width(student, shape, length, on_gpu, half)
    low_rank = sum(module.rank for module in student.modules() if isinstance(module, LowRankLinear))
    whole = 3 * shape.hidden
    if checkpointed:
        return whole + shape.layers * shape.hidden + block + low_rank // shape.layers
    return whole + shape.layers * block + low_rank


def _kept_of_image(student: "PreTrainedModel") -> int:
    """Return the numbers an image that a model whose inside is not known keeps for its backward pass.

    They are counted in a pass without any numbers, on the meta device; 0 for a model that cannot be run there.
    """
    shape = shape_only(student).train()
    own = {tensor.untyped_storage()._cdata for tensor in (*shape.parameters(), *shape.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (key := tensor.untyped_storage()._cdata) not in own:
            kept[key] = tensor
        return tensor

    batch = probe_batch(shape)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            shape(**batch)
    except (RuntimeError, NotImplementedError, ValueError):
        return 0
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) // FLOAT // len(batch["pixel_values"])


def _block_width(model: "PreTrainedModel", shape: ModelShape, length: int, on_gpu: bool, half: bool) -> int:
    """Return the numbers a token that a block keeps for its backward pass.

    Norms keep their input, and what the matrices behind them read; attention its queries, keys, values (a copy for each
    head of queries) and output; a feed-forward layer the input and the output of its activation, and with a gate the
    gate and the product. Attention with dropout keeps its weights, a number for every two tokens, where no kernel does
    both. length: of a text. half: what stands between the matrices stays in fp32, and so counts twice.
    """
    queries, hidden = shape.heads * shape.head, (1 + half) * shape.hidden
    if shape.gated:
        width = 6 * hidden + 4 * queries + 4 * shape.intermediate
    else:
        width = 5 * hidden + 4 * queries + 2 * shape.intermediate
    dropout = max((getattr(model.config, name, 0.0) or 0.0 for name in DROPOUT), default=0.0)
    if family_of(model.config).attention != "dot-product":
        width += 4 * shape.heads * length
    elif dropout > 0 and not on_gpu:
        width += 3 * shape.heads * length
    return width


def _logits(
    resolved: Resolved,
    student: "PreTrainedModel",
    teacher: "PreTrainedModel | None",
    tokens: int,
    own: Request,
    element: int,
    on_gpu: bool,
) -> int:
    """Return the bytes of logits over a vocabulary and of what they are formed from; 0 where none are predicted."""
    head = student.get_output_embeddings() if own.logits else None
    if head is None:
        return 0
    shape = shape_of(student.config)
    assert shape.vocab is not None
    if not family_of(student.config).causal:
        share = 1.0 if own.all_positions else float(resolved.recipe.task.fields.get("mask_probability", 0.15))
        return int(tokens * share * shape.vocab * (2 * element + 2 * FLOAT))
    rows = min(tokens, max(1, (GPU_CHUNK_ELEMENTS if on_gpu else CHUNK_ELEMENTS) // shape.vocab))
    formed = ROWS * rows * shape.vocab * FLOAT
    states = tokens * 2 * FLOAT * shape.hidden
    # The gradient of the weight is formed beside the one that the embeddings get.
    tied = head.weight is student.get_input_embeddings().weight
    weight = shape.vocab * shape.hidden * FLOAT * tied
    half = shape.vocab * 2 * (shape.hidden + (shape_of(teacher.config).hidden if teacher is not None else 0))
    return int(formed + states + weight + half * (element == 2))
