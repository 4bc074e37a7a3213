"""Small helpers for runs over several processes; in a single process each is the identity."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from accelerate import PartialState

Value = TypeVar("Value")


def state() -> "PartialState":
    """Return what this process knows of the others."""
    from accelerate import PartialState

    # Without a GPU it takes several processes for one each, unless it is told that there is none.
    return PartialState(cpu=not torch.cuda.is_available())


def processes() -> int:
    """Return how many processes train together."""
    return state().num_processes


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
