"""Which parameters AdamW trains at which rate: matrices, vectors, and chains of tensors by their length."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.tensors.matched import match_step
from kdcli.tensors.parametrization import chains_of
from kdcli.tensors.sharded import is_sharded, whole, write
from kdcli.training.settings import LoopSettings


def chains_by_length(model: nn.Module, lengths: Collection[int] = ()) -> dict[int, list[nn.Parameter]]:
    """Return the trainable tensors of a model's chains by the number of middle tensors of their chain, in its order.

    lengths: those that have a list although there may be no such chain.
    """
    found: dict[int, list[nn.Parameter]] = {length: [] for length in lengths}
    for shape, chain in chains_of(model):
        found.setdefault(shape.length, []).extend(tensor for tensor in chain if tensor.requires_grad)
    return dict(sorted(found.items()))


def parameter_groups(model: nn.Module, loop: LoopSettings, lengths: Collection[int] = ()) -> list[dict[str, Any]]:
    """Return AdamW's groups: matrices with weight decay, vectors without, and chains of each length at their rate.

    lengths: of chains that may come later; with any, groups may be empty, so that their number stays.
    """
    chains = chains_by_length(model, lengths)
    ours = {id(tensor) for tensors in chains.values() for tensor in tensors}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in ours]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": loop.weight_decay},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
        # Decay would shrink a chain by (1 - lr wd)^n and pull its identities to zero.
        *(
            {"params": tensors, "weight_decay": 0.0, "lr": loop.chain_rate(length)}
            for length, tensors in chains.items()
        ),
    ]
    return [group for group in groups if group["params"] or lengths]


def regroup(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    """Give an optimizer's groups the parameters of `groups`; what it remembers of others goes, new ones start blank."""
    for group, given in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = given["params"]
    kept = {parameter for group in groups for parameter in group["params"]}
    for parameter in [parameter for parameter in optimizer.state if parameter not in kept]:
        del optimizer.state[parameter]


class MatchedSteps:
    """Scales what an optimizer does to a model's chains, step by step, so that their weights move as dense ones would.

    It works on the difference that a step made, whatever made it, and remembers nothing from step to step: a
    resumed training, several processes and accumulated gradients need nothing of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._chains = chains_of(model)
        self._before: list[list[Tensor]] = []

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Scale every step of `optimizer` from now on."""
        optimizer.register_step_pre_hook(self._keep)
        optimizer.register_step_post_hook(self._match)

    def _keep(self, *_: Any) -> None:
        # Chains may have come since the last step.
        self._chains = chains_of(self.model)
        self._before = [[tensor.detach().clone() for tensor in chain] for _, chain in self._chains]

    def _match(self, *_: Any) -> None:
        for (shape, chain), before in zip(self._chains, self._before, strict=True):
            # Of a sharded chain every process scales the whole step, and keeps its part.
            after = [whole(tensor) for tensor in chain]
            match_step(shape, [whole(tensor) for tensor in before], after, trained=_trained(chain))
            with torch.no_grad():
                for tensor, scaled in zip(chain, after, strict=True):
                    if is_sharded(tensor):
                        write(tensor, scaled)
        self._before = []

    def match(self, after: Mapping[nn.Parameter, Tensor]) -> None:
        """Scale a step that was made on copies. after: by the parameters that they are copies of, changed in place."""
        for shape, chain in self._chains:
            match_step(shape, chain, [after.get(tensor, tensor) for tensor in chain], trained=_trained(chain))


def _trained(chain: Sequence[nn.Parameter]) -> int:
    return sum(tensor.numel() for tensor in chain if tensor.requires_grad)
