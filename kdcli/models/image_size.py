"""Models that read images of another size than their own, by interpolating their positions: these become their own."""

from typing import TYPE_CHECKING, Any

from kdcli.models.families import family_of
from kdcli.models.shape import both_sides, shape_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def reads_size(model: Any, height: int, width: int) -> bool:
    """Return whether a model takes square images of this size, and interpolates its table of positions for them.

    One image is tried.
    """
    import torch

    channels = shape_of(model.config).channels
    # Tables are interpolated as squares.
    if height != width or _positions(model) is None or channels is None:
        return False
    try:
        _outputs(model, torch.zeros(1, channels, height, width))
    except (ValueError, RuntimeError):
        return False
    return True


def fit_images(model: "PreTrainedModel", height: int, width: int) -> str | None:
    """Give a model in place the positions of another image size, and return what a user should know.

    They are those that the model interpolates for such images in each forward pass, so that nothing else changes:
    DINOv2, for example, was trained on images of 518 pixels a side and reads images of 224. None, and an unchanged
    model, where that size is its own already, or where it does not read such images (`reads_size`).
    Raises ValueError where the model would compute something else.
    """
    import torch
    from torch import nn

    config, name = model.config, family_of(model.config).sizes.image
    own = shape_of(config).image
    if own is None or name is None or both_sides(own) == (height, width) or not reads_size(model, height, width):
        return None
    embeddings = _positions(model)
    table = embeddings.position_embeddings
    image = torch.randn(1, shape_of(config).channels or 3, height, width, generator=torch.Generator().manual_seed(0))
    before = _outputs(model, image)
    with torch.no_grad():
        tokens = embeddings.patch_embeddings(image.to(table.device, table.dtype))
        # As the forward pass has them: the class token first.
        tokens = torch.cat([tokens[:, :1], tokens], dim=1)
        fitted = embeddings.interpolate_pos_encoding(tokens, height, width)
    embeddings.position_embeddings = nn.Parameter(fitted.clone())
    embeddings.patch_embeddings.image_size = (height, width)
    embeddings.patch_embeddings.num_patches = tokens.shape[1] - 1
    setattr(config, name, height)
    if not torch.equal(before, _outputs(model, image)):
        raise ValueError(f"interpolated positions change what {type(model).__name__} computes")
    sides = " x ".join(map(str, both_sides(own)))
    return f"its positions are interpolated from images of {sides} pixels to {height} x {width}, as it does itself"


def _positions(model: Any) -> Any:
    """Return the module with a model's table of positions that it can interpolate; None where there is none."""
    from torch import nn

    name = family_of(model.config).embeddings
    if not isinstance(model, nn.Module) or not name:
        return None
    module = model.base_model.get_submodule(name)  # type: ignore[operator, union-attr]
    table = getattr(module, "position_embeddings", None)
    return module if isinstance(table, nn.Parameter) and hasattr(module, "interpolate_pos_encoding") else None


def _outputs(model: "PreTrainedModel", image: "Tensor") -> "Tensor":
    import torch

    training, place = model.training, next(model.parameters())
    try:
        with torch.no_grad():
            found: Tensor = model.eval()(pixel_values=image.to(place.device, place.dtype))[0]  # type: ignore[operator]
    finally:
        model.train(training)
    return found
