"""How much the teacher's tensors pull at a student's chains, beside everything else that does."""

import torch
from torch import Tensor

from kdcli.objectives.cores import TensorObjective
from kdcli.signals import Signals
from kdcli.training.step import Distiller

AUXILIARY = "tensor_gradient"
"""Its name in a training's log."""


def auxiliary_share(distiller: Distiller) -> Tensor | None:
    """Return |g_aux| / |g - g_aux| over all trained tensors of the chains, or None without a loss between chains.

    g: the gradients that the tensors hold, of the whole loss and before they are clipped. g_aux: that of the weighted
    loss between the student's and the teacher's tensors, which depends on nothing else: it is formed again here.
    Returns a scalar on the tensors' device.
    """
    found = [name for name, objective in distiller.objectives.items() if isinstance(objective, TensorObjective)]
    teacher = distiller.compared_factors()
    if not found or not teacher:
        return None
    [name] = found
    student = distiller.student_capture.factors()
    tensors = list({id(t): t for key in teacher for t in student[key] if t.requires_grad}.values())
    nothing = torch.zeros(0)
    with torch.enable_grad():
        value = distiller.weights[name] * distiller.objectives[name](
            Signals(nothing, 0, factors=student), Signals(nothing, 0, factors=teacher), {}
        )
        own = torch.autograd.grad(value, tensors, allow_unused=True, materialize_grads=True)
    whole = [t.grad if t.grad is not None else torch.zeros_like(t) for t in tensors]
    pull, rest = (
        torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        for gradients in (own, torch._foreach_sub(whole, own))
    )
    return pull / rest.clamp_min(torch.finfo(rest.dtype).tiny)
