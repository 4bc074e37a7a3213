"""A small random batch that any model takes, and what a model gives for it."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdcli.models.finite import at_fault, check_finite, check_weights
from kdcli.models.inputs import model_inputs
from kdcli.models.shape import both_sides, longest_input, shape_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def probe_batch(model: "PreTrainedModel") -> dict[str, Tensor]:
    """Return a small random batch that any model of its kind takes.

    Of text it is 4 x 16 tokens, the last rows padded; of images (4, channels, height, width) with numbers as wide
    apart as those of real ones.
    """
    generator = torch.Generator().manual_seed(0)
    shape = shape_of(model.config)
    if shape.image is not None:
        pixels = torch.randn(4, shape.channels or 3, *both_sides(shape.image), generator=generator)
        return {"pixel_values": pixels.to(next(model.parameters()).device)}
    length = min(16, longest_input(model.config) or 16)
    ids = torch.randint(5, model.config.vocab_size, (4, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[2:, -(length // 3) :] = 0
    device = next(model.parameters()).device
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@torch.no_grad()
def probe(model: "PreTrainedModel", owner: str = "the model") -> Tensor:
    """Return the model's first output on the probe batch, in eval mode. owner: what an error calls the model.

    Raises NotFiniteError when it contains NaN or inf: no difference says how far another output is from it.
    """
    training = model.training
    output = model.eval()(**model_inputs(model, probe_batch(model)))[0].float()
    model.train(training)
    check_finite(output.cpu(), owner)
    return output


def check_numbers(model: "PreTrainedModel", where: str) -> None:
    """Raise InputError when the weights of a model, or what it makes of a random batch, contain NaN or inf.

    where: the recipe's field that names it. A model of which only the shape is known has none to look at.
    """
    owner = f"the {where.split('.')[0]}"
    if next(model.parameters()).is_meta:
        return
    with at_fault(where):
        check_weights(model, owner)
        probe(model, owner)
