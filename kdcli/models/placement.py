"""Where a model has its weights while it runs: on one device, spread over several, or a part in each process."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from kdcli.errors import InputError
from kdcli.models.blocks import blocks_of
from kdcli.models.families import family_of
from kdcli.models.sharding import Shards, shard, units_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Placement:
    """How a model that only predicts is spread.

    limits: of memory by device ("0", "1", "cpu"), as accelerate takes them; empty for all there is; None for one
    device. sharded: each process holds a part of every block (FSDP2).
    """

    limits: Mapping[str, str] | None = None
    sharded: bool = False


_PLACEMENTS: WeakKeyDictionary[nn.Module, Placement] = WeakKeyDictionary()
_SHARDS: WeakKeyDictionary[nn.Module, Shards] = WeakKeyDictionary()


def spread(model: "PreTrainedModel", placement: Placement) -> None:
    """Let `place` put a model where `placement` says. Copies of the model are not told."""
    _PLACEMENTS[model] = placement


def placement_of(model: nn.Module) -> Placement:
    """Return where `place` puts a model."""
    return _PLACEMENTS.get(model, Placement())


def is_gathered(model: nn.Module) -> bool:
    """True for a model whose blocks are gathered from several processes while they run."""
    return placement_of(model).sharded


def place(model: nn.Module, device: torch.device) -> None:
    """Put a model, now on the CPU, where it runs: on `device`, unless it was told otherwise (`spread`)."""
    placement = placement_of(model)
    if placement.limits is not None and device.type != "cpu":
        _dispatch(model, placement.limits, device)  # type: ignore[arg-type]
    elif placement.sharded and torch.distributed.is_initialized():
        if model not in _SHARDS:
            _SHARDS[model] = shard(model, units_of(model), device, rest=False)  # type: ignore[arg-type]
    else:
        model.to(device)


def bytes_of(limit: str) -> int:
    """Return the bytes of a limit of memory, such as "20GB"."""
    from accelerate.utils import convert_file_size_to_int

    return convert_file_size_to_int(limit)


def take_home(model: nn.Module, home: torch.device | str = "cpu") -> None:
    """Bring a model back to `home` from where `place` put it."""
    if (shards := _SHARDS.pop(model, None)) is not None:
        shards.end(gather=False)
    elif _is_dispatched(model):
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(model, recurse=True)
        for name in ("to", "cuda", "npu", "mlu", "sdaa", "musa", "xpu", "hf_device_map"):
            model.__dict__.pop(name, None)
    model.to(home)


def _is_dispatched(model: nn.Module) -> bool:
    return "hf_device_map" in model.__dict__


def _dispatch(model: "PreTrainedModel", limits: Mapping[str, str], device: torch.device) -> None:
    """Spread a model's blocks over the GPUs and, what is left, the CPU's memory; all else goes to `device`.

    There its logits are formed, a part at a time and without a pass through its last layer.
    """
    if _is_dispatched(model):
        return
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_max_memory

    allowed = {(int(name) if name.isdecimal() else name): limit for name, limit in limits.items()}
    memory = get_max_memory(allowed or None)
    blocks, path = blocks_of(model), path_of_blocks(model)
    inside = {id(parameter) for parameter in blocks.parameters()}
    rest = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in inside)
    if memory.get(device.index, 0) <= rest:
        raise InputError(
            f"{device} has room for {memory.get(device.index, 0) / 1e9:,.2f} GB of the teacher, and its embeddings and "
            f"head alone take {rest / 1e9:,.2f} GB",
            where="teacher.device_map",
            hint="allow more there",
        )
    memory[device.index] -= rest
    found = infer_auto_device_map(blocks, max_memory=memory, no_split_module_classes=[type(blocks[0]).__name__])
    if "disk" in found.values():
        raise InputError(
            "the teacher does not fit into the memory of these devices",
            where="teacher.device_map",
            hint='allow more, take teacher.dtype = "bf16", or a smaller teacher',
        )
    above = {path.rsplit(".", count)[0] for count in range(path.count(".") + 1)}
    places: dict[str, Any] = {}
    for number in range(len(blocks)):
        places[f"{path}.{number}"] = found.get(str(number), found.get(""))
    for name, _ in model.named_modules():
        if name and name not in above and not name.startswith(f"{path}.") and name.rpartition(".")[0] in {"", *above}:
            places[name] = device
    dispatch_model(model, places, main_device=device)


def path_of_blocks(model: "PreTrainedModel") -> str:
    """Return the name of the list of a model's blocks among its modules."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    return f"{prefix}{family_of(model.config).blocks}"
