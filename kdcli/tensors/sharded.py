"""Tensors that several processes hold a part each of, read and written as wholes."""

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """True for a tensor (a `DTensor`) of which this process holds a part."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all its parts, where it is sharded: every process must ask for it; else itself."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor as `like` is held: this process's part on its device, or all of it; nothing is sent."""
    if not is_sharded(like):
        return full.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(full.to(like.device), mesh, placements, src_data_rank=None)


def write(tensor: Tensor, full: Tensor) -> None:
    """Copy a whole tensor into one of its shape, of which this process keeps its part; no gradient is recorded."""
    part = part_of(full.to(tensor.dtype), tensor)
    if is_sharded(tensor):
        tensor.to_local().copy_(part.to_local())  # type: ignore[attr-defined]
    else:
        tensor.copy_(part)
