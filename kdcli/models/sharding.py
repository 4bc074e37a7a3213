"""Models of which every process holds a part: PyTorch's FSDP2, put on and taken off again."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdcli.models.blocks import blocks_of
from kdcli.models.families import family_of
from kdcli.tensors.sharded import is_sharded, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def units_of(model: "PreTrainedModel") -> list[nn.Module]:
    """Return the modules of a model whose weights are gathered one after the other: its blocks.

    A block that is run several times stays with the rest: it would be gathered again and again.
    """
    family = family_of(model.config)
    return [] if family.repeated or family.outputs_only is not None else list(blocks_of(model))


def has_shards(module: nn.Module) -> bool:
    """True when some parameter of a module is sharded."""
    return any(is_sharded(parameter) for parameter in module.parameters())


@dataclass
class Shards:
    """A module whose parameters are sharded over all processes (`shard`), and what it is without that.

    Each process holds its part of every parameter on its device. The whole ones wait in the memory of the CPU, as they
    were, and come back with `end`.
    """

    root: nn.Module
    _plain: list[tuple[nn.Module, str, nn.Parameter]] = field(default_factory=list)

    def end(self, *, gather: bool) -> None:
        """Make plain modules of all again, on the CPU. gather: with the values of the shards, as training left them.

        Every process must call it. Hooks of others, and which modules share a parameter, stay as they are.
        """
        shards = {id(plain): module._parameters[name] for module, name, plain in self._plain}
        if gather:
            for module in _sharded_modules(self.root):
                module.reshard()  # type: ignore[operator]
            shards = {id(plain): module._parameters[name] for module, name, plain in self._plain}
            plain_ones = {id(plain): plain for _, _, plain in self._plain}
            with torch.no_grad():
                for key, shard in shards.items():
                    assert shard is not None
                    plain_ones[key].copy_(whole(shard))
        _remove(self.root)
        for module, name, plain in self._plain:
            module._parameters[name] = plain
        self.root.to("cpu")


def shard(
    root: nn.Module, units: Iterable[nn.Module], device: torch.device, *, rest: bool = True, half: bool = False
) -> Shards:
    """Shard the parameters of `root` over all processes by FSDP2 (`fully_shard`), and return how to undo it.

    units: modules inside whose parameters are gathered only while they run; all others are gathered while `root` runs,
    or, without `rest`, stay whole, so that they may be used by themselves.
    half: the weights of units are gathered in bf16, and their gradients sent in fp32: under autocast a copy in bf16
    would be kept of each until the backward pass, whole in every process.
    No unit's forward pass may be left early, and in training each must have an output that the loss depends on.
    device: of this process. Buffers go there, too.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    plain = [(module, name, p) for module in root.modules() for name, p in module._parameters.items() if p is not None]
    values: dict[int, Tensor] = {id(parameter): parameter.data for _, _, parameter in plain}
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=policy if half else MixedPrecisionPolicy())
    if rest:
        fully_shard(root, mesh=mesh)
    for module, name, parameter in plain:
        if module._parameters[name] is parameter:
            parameter.data = parameter.data.to(device)
        else:
            # It was moved to the device as a whole, and nothing needs it there.
            parameter.data = values[id(parameter)]
    for module in root.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer.to(device) if buffer is not None else None
    return Shards(root, plain)


def _sharded_modules(root: nn.Module) -> Iterator[Any]:
    from torch.distributed.fsdp import FSDPModule

    return (module for module in root.modules() if isinstance(module, FSDPModule))


def _remove(root: nn.Module) -> None:
    """Take FSDP2 off a module and all inside, which PyTorch has no function for: its hooks, classes and states."""
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
    from torch.distributed._composable_state import _module_state_mapping

    for module in list(_sharded_modules(root)):
        state = module._get_fsdp_state()
        handles = [state._pre_forward_hook_handle, state._post_forward_hook_handle]
        for group in state._fsdp_param_groups:
            handles += group._module_to_pre_save_state_dict_hook_handle.values()
            handles += group._module_to_pre_load_state_dict_hook_handle.values()
        for handle in handles:
            handle.remove()
        _module_state_mapping.pop(module, None)
        for key in (STATE_KEY, REGISTRY_KEY):
            module.__dict__.pop(key, None)
        module.__class__ = type(module).__mro__[2]
    for module in root.modules():
        for mark in ("_is_fsdp_managed_module", "_fsdp_use_orig_params"):
            module.__dict__.pop(mark, None)
