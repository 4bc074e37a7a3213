"""What the tables of `tables.py` are made of: rows, sizes, cells, and what a cell gave."""

from dataclasses import dataclass
from pathlib import Path

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "methods"
UNFIT = {("dbkd", "stsb")}
"""Recipes and tasks that do not go together: a regression has no decisions."""
COSTS = {
    "kd": 1.05,
    "makd": 1.8,
    "tinybert": 1.3,
    "minilm": 1.6,
    "distilbert": 1.5,
    "theseus": 1.0,
    "dbkd": 1.1,
    "adkd": 3.6,
    "lgtm": 9.4,
}
"""Seconds of a step, with fine-tuning of a student of 3 blocks = 1; chains add CHAIN_COST."""
CHAIN_COST = 1.5
STEP_SECONDS, CELL_SECONDS, AT_A_TIME = 0.01, 3.0, 5.0
"""What the estimate assumes of a GPU: a plain step, what is done once a cell, processes that do not slow each other."""


@dataclass(frozen=True)
class Row:
    """A student: a recipe of recipes/methods with some fields changed, FIELD=VALUE. table: the title of its table."""

    table: str
    label: str
    recipe: str
    changes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What its files are called: `makd-budget-0.5`."""
        fields = (change.replace('"', "").split("=") for change in self.changes)
        return "-".join([self.recipe, *(f"{field.rpartition('.')[2]}-{value}" for field, value in fields)])


@dataclass(frozen=True)
class Size:
    """How much of a task is trained on: rows, rows of a step, and passes over them of a student and of the teacher.

    table: the fields of `[task]`, as a TOML table; left out, the task is known by its name.
    """

    rows: int
    batch: int
    epochs: int
    teacher_epochs: int
    changes: tuple[str, ...] = ()
    table: str = ""

    @property
    def steps(self) -> int:
        """Steps of a student."""
        return self.epochs * -(-self.rows // self.batch)


@dataclass(frozen=True)
class Profile:
    """The size of every task, what every recipe is changed in, and the tables that have not all tasks."""

    sizes: dict[str, Size]
    changes: tuple[str, ...]
    only: dict[str, tuple[str, ...]]

    def runs(self, row: Row, task: str) -> bool:
        """True where a row has a cell on a task."""
        return (row.recipe, task) not in UNFIT and task in self.only.get(row.table, tuple(self.sizes))


@dataclass(frozen=True)
class Cell:
    """One student: a row on a task with one seed."""

    row: Row
    task: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.row.name}-seed{self.seed}"

    def changes(self, profile: Profile) -> list[str]:
        """Return all changes of its recipe, but for what depends on the machine."""
        size = profile.sizes[self.task]
        return [
            f"task={size.table}" if size.table else f'task="{self.task}"',
            f"task.train_samples={size.rows}",
            f"train.batch_size={size.batch}",
            f"train.epochs={size.epochs}",
            f"teacher.finetune.epochs={size.teacher_epochs}",
            f"seed={self.seed}",
            *profile.changes,
            *size.changes,
            *self.row.changes,
        ]

    def seconds(self, profile: Profile) -> float:
        """Return what it takes on a GPU alone, by the assumptions of the estimate."""
        chains = any(change.startswith("overparam.") for change in self.row.changes)
        return CELL_SECONDS + STEP_SECONDS * profile.sizes[self.task].steps * (
            COSTS[self.row.recipe] + CHAIN_COST * chains
        )


@dataclass(frozen=True)
class Outcome:
    """What a cell gave, and what it was made from. seconds: of training, and of all; teacher's are not among them.

    megabytes: of the student; teacher_parameters, teacher_megabytes: as much of its teacher.
    """

    cell: str
    changes: list[str]
    teacher: float
    student: float
    parameters: int
    train_seconds: float
    seconds: float
    device: str
    megabytes: float = 0.0
    teacher_parameters: int = 0
    teacher_megabytes: float = 0.0


@dataclass(frozen=True)
class Study:
    """A set of tables.

    stages: all rows, in the order that they run in. metrics: the tasks, in the order of columns, with what stands over
    each. baselines: the tables, and the row that differences are taken from in each. order: of tasks. seeds_last: all
    rows of one seed, stage by stage, before those of the next; else all seeds of a stage before the next stage.
    """

    stages: tuple[tuple[Row, ...], ...]
    metrics: dict[str, str]
    order: tuple[str, ...]
    baselines: dict[str, Row]
    cpu: Profile
    gpu: Profile | None = None
    seeds: int = 3
    seeds_last: bool = False

    def cells(self, profile: Profile, seeds: int | None = None) -> list[Cell]:
        """Return all cells, the most important ones first."""
        numbers = range(42, 42 + (seeds or self.seeds))
        blocks = (
            [(stage, [seed]) for seed in numbers for stage in self.stages]
            if self.seeds_last
            else [(stage, numbers) for stage in self.stages]
        )
        return [
            Cell(row, task, seed)
            for stage, some in blocks
            for task in self.order
            for seed in some
            for row in stage
            if profile.runs(row, task)
        ]
