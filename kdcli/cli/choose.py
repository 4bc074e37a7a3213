"""What `eval` and `export` share: which model, which task, when the user leaves them out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcli.errors import InputError
from kdcli.recipe.schema import EvaluateSection, Recipe, TaskSection
from kdcli.runs import Run, latest_run, run_of_model


@dataclass
class Choice:
    """A model's name, and the run that it belongs to, if any."""

    model: str
    run: Run | None

    @property
    def recipe(self) -> Recipe | None:
        """The recipe of the run."""
        return Recipe.model_validate(self.run.record["recipe"]) if self.run is not None else None


def choose_model(model: str | None) -> Choice:
    """Return the model that was named, or the newest run's student. Raises InputError without any run."""
    if model is None:
        run = latest_run()
        return Choice(str(run.student), run)
    path = Path(model)
    if (path / "student").is_dir() and (path / "run.json").is_file():
        return Choice(str(path / "student"), Run(path.resolve()))
    return Choice(model, run_of_model(path) if path.is_dir() else None)


def choose_task(
    choice: Choice, name: str | None, *, protocol: str | None = None, samples: int | None = None
) -> tuple[TaskSection, EvaluateSection, Path]:
    """Return the task to judge on: the one named, with the run's own settings where it is the same task.

    Raises InputError when nothing says which task it is.
    """
    recipe = choice.recipe
    base = Path()
    if recipe is not None and name in (None, recipe.task.name):
        assert choice.run is not None
        section, evaluate = recipe.task, recipe.evaluate
        base = Path(choice.run.record["recipe_folder"])
    elif name is not None:
        length = recipe.task.max_length if recipe is not None else 128
        section, evaluate = TaskSection(name=name, max_length=length), EvaluateSection()
    else:
        raise InputError(
            f"which task is {choice.model} to be judged on?",
            where="--task",
            hint="give --task NAME, such as sst2",
        )
    if samples is not None:
        section = section.model_copy(update={"validation_samples": samples})
    if protocol is not None:
        evaluate = EvaluateSection.model_validate({**evaluate.model_dump(), "protocol": protocol})
    return section, evaluate, base


def load_contestant(name: str) -> tuple[Any, Any]:
    """Return a classifier (PyTorch model or ONNX session) and its tokenizer."""
    from kdcli.export.session import OnnxModel, is_onnx_folder
    from kdcli.models.load import load_model, load_tokenizer

    if is_onnx_folder(Path(name)):
        return OnnxModel(Path(name)), load_tokenizer(name)
    return load_model(name), load_tokenizer(name)
