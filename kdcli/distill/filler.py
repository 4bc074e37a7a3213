"""The masked language model of `[task.augment]`: loaded, or given a head first; and the copies that it makes."""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from torch import Tensor

from kdcli.augment.copies import MODEL, Vocabulary, add_copies, text_of, words_of
from kdcli.augment.stop_words import ENGLISH, is_stop_word, normal
from kdcli.augment.suggest import Suggester, by_sentence, chunks_of, fill_cache
from kdcli.distill.teacher import TeacherStart, make_teacher, seed_of, start_teacher
from kdcli.errors import InputError, RunError
from kdcli.files import source_of
from kdcli.machine import computing_device, resolve_precision
from kdcli.models.load import check_vocabulary, has_head, load_config, load_model, load_tokenizer
from kdcli.recipe.schema import (
    AugmentSection,
    FinetuneSection,
    Recipe,
    TaskSection,
    TeacherFinetuneSection,
    TeacherSection,
)
from kdcli.tasks.base import Task
from kdcli.tasks.encode import check_room
from kdcli.tasks.load import load_task
from kdcli.tasks.masked_lm import KIND as PLAIN_TEXT
from kdcli.tasks.masked_lm import MASKED_LM
from kdcli.terminal import tell
from kdcli.training.distributed import agree, main_does
from kdcli.training.settings import check_batch
from kdcli.words import counted

if TYPE_CHECKING:
    from kdcli.distill.job import Job


@dataclass(frozen=True)
class FillerStart:
    """The masked language model of `[task.augment]` before any work.

    training: recipe, text and start of a model that is given a masked-LM head first; None for one that has it.
    """

    source: str
    training: tuple[Recipe, Task, TeacherStart] | None = None


def start_filler(recipe: Recipe, task: Task, base: Path, world: int) -> FillerStart:
    """Return the start of the model that fills the copies of `task`. Trains and writes nothing.

    Raises InputError when there is no such model, when it has no masked-LM head and there is no usable text to give it
    one, when its tokenizer does not fit it or has no mask or no whole words, and when no row has a word to replace.
    """
    section = recipe.task.augment
    assert section is not None
    source = source_of(section.model, base)
    with _at(MODEL):
        headed, tokenizer = has_head(source, MASKED_LM), load_tokenizer(source)
    if not headed and section.text is None:
        raise InputError(
            f"{section.model} has no masked-LM head: it cannot predict masked words",
            where=MODEL,
            hint="name a masked language model, such as google-bert/bert-base-uncased, or give task.augment.text: "
            "plain text to train such a head on",
        )
    if tokenizer.mask_token_id is None:
        raise InputError(f"the tokenizer of {section.model} has no mask token", where=MODEL)
    check_room(tokenizer, recipe.task.max_length, pair=False)
    Vocabulary(tokenizer)
    fields = task.kind.columns_of_text(task.train)
    stop_words = stop_words_of(section)
    texts = (text_of(cell) for name in fields for cell in task.train[name])
    words = (text[start:end] for text in texts for start, end in words_of(text))
    if all(is_stop_word(word, stop_words) for word in words):
        raise InputError("no training row has a word that can be replaced", where="task.augment")
    if headed:
        with _at(MODEL):
            check_vocabulary(load_config(source), tokenizer)
        return FillerStart(source)
    tuning = TeacherFinetuneSection(**section.finetune.model_dump(exclude_unset=True)) if section.finetune else True
    teacher = TeacherSection(model=section.model, finetune=tuning, seed=seed_of(recipe))
    text = TaskSection(name="augment", type=PLAIN_TEXT.name, data=section.text, max_length=recipe.task.max_length)
    tuned = recipe.model_copy(update={"teacher": teacher, "task": text})
    with _at("task.augment.text"):
        documents = load_task(text, recipe.evaluate, base=base)
    with _at(MODEL):
        start = start_teacher(tuned, documents, MASKED_LM, base=base, world=world)
    with _at("task.augment.text"):
        documents.kind.check(documents, tokenizer, text.max_length)
    check_batch((section.finetune or FinetuneSection()).batch_size, 1, world, "task.augment.finetune.batch_size")
    return FillerStart(source, (tuned, documents, start))


def stop_words_of(section: AugmentSection) -> frozenset[str]:
    """Return the words that copies keep, as `normal` writes them."""
    return ENGLISH if section.stop_words is None else frozenset(map(normal, section.stop_words))


@contextlib.contextmanager
def _at(where: str) -> Iterator[None]:
    """Let errors name the field `where`, which stands for what they are about."""
    try:
        yield
    except InputError as error:
        raise InputError(error.message, where=where, hint=error.hint) from error


def make_filler(
    start: FillerStart, *, console: Console, refresh: bool, resume: bool, work: Path, log: Path | None = None
) -> str:
    """Return the folder or hub name of the model that fills the copies of `[task.augment]`.

    One without a masked-LM head is first fine-tuned on `task.augment.text`, and kept like a teacher.
    Raises RunError where it cannot be kept.
    """
    if start.training is None:
        return start.source
    recipe, documents, teacher = start.training
    found = make_teacher(
        teacher, recipe, documents, MASKED_LM, console=console, refresh=refresh, resume=resume, work=work, log=log
    )
    if found.path is None:
        raise RunError(
            "the masked language model for copies could not be kept", hint="set KDCLI_CACHE to a folder with room"
        )
    return str(found.path)


def add_copies_to(task: Task, job: "Job") -> Task:
    """Return a job's task with the copies of `[task.augment]`; as it is where the recipe has no such table."""
    if (start := job.prepared.filler) is None:
        return task
    with job.timed("augment"):
        return augment_task(task, job.recipe, make_filler(start, **job.settings_of("augment")), console=job.console)


def augment_task(task: Task, recipe: Recipe, source: str, *, console: Console) -> Task:
    """Return `task` with copies behind its training rows, and what was made in its description.

    source: the model, from `make_filler`. In a run over several processes the main one asks it, and the others
    read what it kept.
    Raises InputError when no row has a word that can be replaced.
    """
    section = recipe.task.augment
    assert section is not None
    model, tokenizer = load_model(source, MASKED_LM), load_tokenizer(source)
    suggester = Suggester(
        model,
        tokenizer,
        top_k=section.top_k,
        batch_size=section.batch_size,
        max_length=recipe.task.max_length,
        precision=resolve_precision(recipe.train.precision, recipe.train.device),
        device=torch.device(computing_device(recipe.train.device)),
        console=console,
        stop_words=stop_words_of(section),
    )
    fields = task.kind.columns_of_text(task.train)
    sentences = list(dict.fromkeys(text_of(cell) for name in fields for cell in task.train[name]))
    main_does(lambda: fill_cache(suggester, sentences, section.model, console))
    candidates: dict[str, Tensor] = {}
    digest = hashlib.sha256()
    for chunk in chunks_of(sentences):
        found = suggester.ask(chunk)
        digest.update(found.numpy().tobytes())
        candidates.update(by_sentence(chunk, found))
    if agree(digest.hexdigest()) != digest.hexdigest():
        raise RunError(
            "the processes do not agree on the words to replace: they share no cache, and their devices differ",
            hint="set KDCLI_CACHE to a folder that all of them see",
        )
    train = add_copies(
        task.train,
        candidates,
        suggester.vocabulary,
        section.copies,
        section.probability,
        texts=fields,
        seed=recipe.seed,
    )
    made, wanted = len(train) - len(task.train), len(task.train) * section.copies
    if not made:
        raise InputError("no training row has a word that can be replaced", where="task.augment")
    left_out = wanted - made
    few = f"; {counted(left_out, 'copy', 'copies')} left out, as too few words can change" if left_out > 0 else ""
    tell(console, f"augment: {counted(len(task.train), 'row')} and {counted(made, 'copy', 'copies')}{few}")
    told = section.model_dump(exclude_none=True)
    description = {**told, "rows": len(task.train), "added": made, "left_out": left_out}
    return replace(task, train=train, description={**task.description, "augment": description})
