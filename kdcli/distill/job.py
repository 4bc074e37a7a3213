"""What the parts of one run share, and how a run that ends early is left behind."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from kdcli import interrupts, runs
from kdcli.distill.prepare import Prepared
from kdcli.distill.resolve import Resolved
from kdcli.errors import InputError
from kdcli.faults import writing
from kdcli.files import write_json
from kdcli.recipe.schema import Recipe
from kdcli.runs import Run
from kdcli.terminal import tell
from kdcli.training.distributed import agree, is_main, main_does


@dataclass
class Job:
    """A prepared recipe on its way through a run folder. seconds: that each part took."""

    prepared: Prepared
    run: Run
    console: Console
    resume: bool
    refresh: bool
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def resolved(self) -> Resolved:
        return self.prepared.resolved

    @property
    def recipe(self) -> Recipe:
        return self.prepared.resolved.recipe

    def timed(self, part: str) -> AbstractContextManager[None]:
        """Note the seconds that a block takes."""
        return runs.timed(self.seconds, part)

    def settled(self, path: Path, choose: Callable[[], Any]) -> Any:
        """Return a choice, as JSON has it, that all processes take; a resumed run takes the one kept at `path`."""
        known: Any = json.loads(path.read_text(encoding="utf-8")) if self.resume and path.exists() else None
        if (agreed := agree(known)) is None:
            # Measured on several devices, it might come out otherwise.
            agreed = agree(choose())
            path.parent.mkdir(parents=True, exist_ok=True)
            main_does(lambda: write_json(path, agreed))
        return agreed

    def tell(self, message: str) -> None:
        """Print a line for the user."""
        tell(self.console, message)

    def settings_of(self, part: str) -> dict[str, Any]:
        """Return where a part of the run keeps its checkpoints (work) and curves (log), and how it reports."""
        return {
            "work": self.run.checkpoints / part,
            "log": self.run.log / part,
            "console": self.console,
            "resume": self.resume,
            "refresh": self.refresh,
        }


@dataclass
class Attempt:
    """Whether a run holds something that took work: a trained assistant or student."""

    run: Run
    worth_keeping: bool

    def keep(self) -> None:
        """From now on this run is worth more than none, and than the one that it replaces."""
        self.worth_keeping = True
        main_does(self.run.settle)


@contextmanager
def attempt(run: Run, document: dict[str, Any], resume: bool) -> Iterator[Attempt]:
    """Leave of a run what is worth keeping, however it ends. document: its recipe, as run.json holds it.

    When the input turns out to be wrong before a model was trained, nothing is left behind, and a run that was to be
    replaced is put back; after that everything stays, for `--resume`.
    """
    if resume:
        runs.check_same_recipe(run, document)
    made = Attempt(run, resume)
    try:
        # What fails on a disk, and says not where, fails in the run's folder most likely.
        with writing(run.path):
            yield made
    except InputError:
        if is_main():
            run.mark("failed") if made.worth_keeping else run.discard()
        raise
    except BaseException as error:
        if is_main():
            stopped = isinstance(error, KeyboardInterrupt) or interrupts.received() is not None
            run.mark("interrupted" if stopped else "failed")
        raise
