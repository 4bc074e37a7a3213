"""What goes wrong in a process that prepares batches: told by the process that trains."""

from dataclasses import dataclass
from typing import Any

from kdcli.errors import KdcliError
from kdcli.faults import explain

FAULT = "fault"
"""The only entry of a batch that could not be made: the error."""


@dataclass
class WorkerCollator:
    """A collator for other processes: an error that a user can mend is its batch, of `raise_fault`.

    PyTorch would make a text of it, with the lines of the program where it was raised.
    """

    collator: Any

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        from torch.utils.data import get_worker_info

        try:
            batch: dict[str, Any] = self.collator(rows)
        except Exception as error:
            if get_worker_info() is None or (told := explain(error)) is None:
                raise
            return {FAULT: told}
        return batch

    def begin_epoch(self, epoch: int) -> None:
        """Tell the collator which epoch begins, where it cares."""
        if hasattr(self.collator, "begin_epoch"):
            self.collator.begin_epoch(epoch)


def raise_fault(batch: Any) -> None:
    """Raise the error of a batch that could not be made."""
    if isinstance(fault := batch.get(FAULT), KdcliError):
        raise fault
