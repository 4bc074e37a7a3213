"""Fine-tuning a general student on tasks, beside others that are fine-tuned in the same way."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kdcli.distill.resolve import placed
from kdcli.evaluation.result import TaskScores
from kdcli.evaluation.score import calibrate, evaluate_model, primary_score
from kdcli.files import atomic_folder
from kdcli.models.heads import with_new_head
from kdcli.models.reinit import reinitialise
from kdcli.models.save import round_to_stored, save_model
from kdcli.recipe.schema import Recipe
from kdcli.runs import Run
from kdcli.tasks.base import Task
from kdcli.tasks.load import load_task
from kdcli.training.distributed import main_does
from kdcli.training.finetune import finetune

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdcli.distill.job import Job
    from kdcli.distill.student import Distilled
    from kdcli.distill.teacher import Teacher


def tasks_of(recipe: Recipe, base: Path) -> list[Task]:
    """Return the tasks of `[[finetune]]` in their order. Raises InputError, naming the table, for an unusable one."""
    tasks = []
    for number, section in enumerate(recipe.finetune):
        with placed(f"finetune[{number}].task", "task"):
            tasks.append(load_task(section.task, recipe.evaluate, base=base))
    return tasks


def score_on_tasks(job: "Job", student: "Distilled", teacher: "Teacher") -> list[TaskScores]:
    """Fine-tune and score the student, and what it is compared with, on every task of `[[finetune]]`.

    The student of the first seed is kept in the run. Neither model is changed.
    """
    recipe, results = job.recipe, []
    for number, (section, task) in enumerate(zip(recipe.finetune, job.prepared.downstream, strict=True), 1):
        names = ["student", *dict.fromkeys(section.against)]
        scores: dict[str, list[float]] = {name: [] for name in names}
        metrics: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in names}
        for seed in range(recipe.seed, recipe.seed + section.seeds):
            for name in names:
                torch.manual_seed(seed)
                settings = task.kind.configure(task.label_names)
                source = teacher if name == "teacher" else student
                model = with_new_head(source.model, task.kind.head, settings)
                processor = task.kind.processor(source.processor)
                if name == "scratch":
                    reinitialise(model)
                finetune(
                    model,
                    processor,
                    task,
                    section,
                    recipe.train,
                    max_length=section.task.max_length,
                    seed=seed,
                    work=job.run.checkpoints / "finetune" / f"{number}-{name}-{seed}",
                    console=job.console,
                    resume=job.resume,
                    title=f"{task.name} {name}",
                    log=job.run.log / "finetune" / f"{number}-{name}-{seed}",
                    identity={
                        "recipe": recipe.model_dump(),
                        "data": task.description["fingerprint"],
                        "training": [number, name, seed],
                    },
                )
                model.eval().to("cpu")  # type: ignore[arg-type]
                round_to_stored(model)
                options: Any = {
                    "batch_size": recipe.evaluate.batch_size,
                    "max_length": section.task.max_length,
                    "owner": f"the {name} fine-tuned on {task.name}",
                    "device": recipe.train.device,
                }
                calibrate(model, processor, task, **options)
                found = evaluate_model(model, processor, task, **options)
                metrics[name].append(found)
                scores[name].append(primary_score(found, task.primary))
                if name == "student" and seed == recipe.seed:
                    main_does(partial(_keep, model, processor, job.run, job.run.tuned(task.name)))
        results.append(TaskScores(task.name, task.primary, scores, metrics))
    return results


def _keep(model: "PreTrainedModel", processor: Any, run: Run, folder: Path) -> None:
    with atomic_folder(folder, ours=True) as temporary:
        save_model(model, temporary, processor)
    run.note_files(folder)
