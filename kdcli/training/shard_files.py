"""Files of a sharded training: as one process writes and reads them, so that any number of processes goes on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from kdcli.tensors.parametrization import forget_contractions
from kdcli.tensors.sharded import part_of, whole, write


def whole_tensors(module: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Return all tensors of a sharded module's state, whole and on the CPU; one that has two names once.

    Every process must call it, and those that do not `keep` what comes get nothing: there is room for one.
    """
    found, seen = {}, set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            full = whole(tensor.detach())
            if keep:
                found[name] = full.to("cpu").contiguous()
    return found


@torch.no_grad()
def load_parts(module: nn.Module, path: Path) -> None:
    """Copy a file's tensors into a sharded module, of each this process's part. Raises KeyError for a missing one."""
    names: dict[int, list[str]] = {}
    tensors = module.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    with safe_open(path, framework="pt") as file:
        there = set(file.keys())
        for own in names.values():
            if not (given := there.intersection(own)):
                raise KeyError(f"{path} has no {own[0]}")
            write(tensors[own[0]], file.get_tensor(min(given)))
    forget_contractions(module)


def whole_optimizer_state(optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Any]:
    """Return an optimizer's state with whole tensors on the CPU; to be called and kept as in `whole_tensors`."""
    state = optimizer.state_dict()
    moments: dict[int, dict[str, Any]] = {}
    for number, entry in sorted(state["state"].items()):
        full = {name: whole(value) if isinstance(value, Tensor) else value for name, value in entry.items()}
        if keep:
            moments[number] = {name: v.to("cpu") if isinstance(v, Tensor) else v for name, v in full.items()}
    return {**state, "state": moments}


def optimizer_state_in_parts(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return a whole state as the optimizer of a sharded module takes it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def part(value: Any, parameter: Tensor) -> Any:
        alike = isinstance(value, Tensor) and value.shape == parameter.shape
        return part_of(value, parameter) if alike else value

    parts = {
        number: {name: part(value, parameters[number]) for name, value in entry.items()}
        for number, entry in state["state"].items()
    }
    return {**state, "state": parts}
