"""Small helpers for runs over several processes; in a single process each is the identity."""

import os
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import torch

from kdcli.errors import InputError

if TYPE_CHECKING:
    from accelerate import PartialState

Value = TypeVar("Value")


def state() -> "PartialState":
    """Return what this process knows of the others."""
    from accelerate import PartialState

    launcher_shards()
    # Without a GPU it takes several processes for one each, unless it is told that there is none.
    return PartialState(cpu=not torch.cuda.is_available())


@cache
def launcher_shards() -> bool:
    """True when `accelerate launch` was told to shard the model (`--use_fsdp`, or a configuration that says so).

    Its libraries are not told: they would shard the model once more, their own way.
    Raises InputError for what kdcli's sharding has not: the first version of FSDP, weights in the CPU's memory.
    """
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError(
            "accelerate is set to shard by the first version of FSDP, and kdcli shards by the second",
            where="accelerate launch",
            hint="give --fsdp_version 2, or fsdp_version: 2 in its configuration",
        )
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise InputError(
            "accelerate is set to keep sharded weights in the memory of the CPU, which kdcli does not",
            where="accelerate launch",
            hint="give --fsdp_offload_params false, and train.gradient_checkpointing = true to save memory",
        )
    return True


def shards(wanted: str | None) -> bool:
    """True when the student is sharded now: where it `may_shard` (which raises InputError), over several processes."""
    return may_shard(wanted) and processes() > 1


def may_shard(wanted: str | None) -> bool:
    """True when several processes are to share out the student. wanted: `train.sharding`; None follows the launcher.

    Raises InputError where recipe and launcher say different things.
    """
    if wanted == "none" and launcher_shards():
        raise InputError(
            'train.sharding is "none", and accelerate launch is set to shard (--use_fsdp)',
            where="train.sharding",
            hint="leave one of them out",
        )
    return wanted == "fsdp" or (wanted is None and launcher_shards())


def processes() -> int:
    """Return how many processes train together."""
    return state().num_processes


def process() -> int:
    """Return the number of this process, from 0."""
    return state().process_index


def is_main() -> bool:
    """True in the process that writes files and talks to the user."""
    return state().is_main_process


def agree(value: Value) -> Value:
    """Return the main process's `value` in every process."""
    if state().num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    box = [value]
    broadcast_object_list(box, from_process=0)
    return box[0]


def shared(value: Value) -> list[Value]:
    """Return every process's `value`, in every process and in their order."""
    if state().num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def wait_for_all() -> None:
    """Return when every process has come here."""
    state().wait_for_everyone()


def rng_file() -> str:
    """Return the name under which the library keeps this process's random state in a checkpoint."""
    return "rng_state.pth" if state().num_processes == 1 else f"rng_state_{state().process_index}.pth"


def main_does(action: Callable[[], object]) -> None:
    """Run `action` in the main process only; the others wait until it is done.

    When it fails, every process fails with the same error instead of waiting forever.
    """
    error: BaseException | None = None
    if is_main():
        try:
            action()
        except Exception as caught:
            error = caught
    error = agree(error)
    if error is not None:
        raise error
