"""Asking a masked language model which words could stand in place of those in a task's rows, for copies of them.

Every word of a sentence is masked once by itself, the sentence's other words in place, and the model's most likely
words there become its candidates. A word of several word-pieces gives way to one single mask. (TinyBERT takes the
nearest GloVe vectors there; kdcli ships none: they are a download as large as the model, for one language, and the
mask asks for the same thing.) The teacher itself is never fine-tuned on copies.
Source: Jiao et al. 2020 (TinyBERT), algorithm 1.
"""

import contextlib
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from kdcli.errors import InputError, RunError
from kdcli.files import cache_dir, fingerprint
from kdcli.machine import resolve_precision
from kdcli.models.finite import check_finite
from kdcli.models.load import check_vocabulary, has_head, load_config, load_model, load_tokenizer
from kdcli.models.shape import longest_input
from kdcli.objectives.base import Wants
from kdcli.recipe.schema import FinetuneSection, Recipe, TaskSection, TeacherSection
from kdcli.tasks.augment import FIELDS, MODEL, NONE, Vocabulary, add_copies, words_of
from kdcli.tasks.base import Task
from kdcli.tasks.encode import Collator, check_room
from kdcli.tasks.load import load_task
from kdcli.tasks.prepare import check_encoding
from kdcli.training.capture import Capture
from kdcli.training.distributed import agree, main_does, processes, state
from kdcli.training.hashing import hash_of_model, hash_of_tokenizer
from kdcli.training.loop import check_batch
from kdcli.training.teacher import TeacherStart, make_teacher, resolve_source, seed_of, start_teacher
from kdcli.training.tensor_file import keep_tensors, kept_tensors
from kdcli.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 256
"""Sentences a file of the cache: what an interruption costs at most."""


def _of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@dataclass
class Suggester:
    """A masked language model that says what else could stand in place of each word of a sentence.

    max_length: tokens of a sentence that are read; words after them have no candidates.
    """

    model: "PreTrainedModel"
    tokenizer: Any
    top_k: int
    batch_size: int
    max_length: int
    precision: str
    device: torch.device
    console: Console | None = None

    def __post_init__(self) -> None:
        self.vocabulary = Vocabulary(self.tokenizer)
        self.mask = self.tokenizer.mask_token
        longest = longest_input(self.model.config)
        self.max_length = min(self.max_length, self.tokenizer.model_max_length, longest or self.max_length)
        self.folder = (
            cache_dir()
            / "augment"
            / fingerprint(
                {
                    "model": hash_of_model(self.model),
                    "tokenizer": hash_of_tokenizer(self.tokenizer),
                    "top_k": self.top_k,
                    "max_length": self.max_length,
                    "precision": self.precision,
                    "format": 2,
                }
            )
        )

    def path(self, sentences: list[str]) -> Path:
        """Return the file that keeps the candidates for these sentences, in this order."""
        return self.folder / f"{fingerprint(sentences)}.safetensors"

    def kept(self, sentences: list[str]) -> Tensor | None:
        """Return the candidates that the cache holds for these sentences, or None."""
        path = self.path(sentences)
        shapes = {"candidates": (sum(len(words_of(text)) for text in sentences), self.top_k)}
        found = kept_tensors(path, shapes, of=_of(path), console=self.console)
        return found["candidates"] if found is not None else None

    def ask(self, sentences: list[str]) -> Tensor:
        """Return (words, top_k) token ids, the likeliest first, -1 where there are no more; int32.

        Rows are the words of the first sentence, then those of the second, and so on. What the cache holds is not
        asked again, and what is asked goes into the cache.
        """
        if (found := self.kept(sentences)) is not None:
            return found
        return self.make(sentences)

    def make(self, sentences: list[str]) -> Tensor:
        """Ask the model, whatever the cache holds, and keep what it says."""
        candidates = self._candidates(sentences)
        path = self.path(sentences)
        keep_tensors(path, {"candidates": candidates}, of=_of(path))
        return candidates

    @torch.inference_mode()
    def _candidates(self, sentences: list[str]) -> Tensor:
        places = [(text, start, end) for text in sentences for start, end in words_of(text)]
        candidates = torch.full((len(places), self.top_k), NONE, dtype=torch.int32)
        if not places:
            return candidates
        encoded = self.tokenizer(
            [text[:start] + self.mask + text[end:] for text, start, end in places],
            truncation=True,
            max_length=self.max_length,
        )
        rows = []
        for number, (text, start, _) in enumerate(places):
            ids = encoded["input_ids"][number]
            masks = [i for i, token in enumerate(ids) if token == self.tokenizer.mask_token_id]
            # A text may hold masks of its own.
            before = text[:start].count(self.mask)
            if before < len(masks):
                names = ("input_ids", "attention_mask", "token_type_ids")
                row = {name: encoded[name][number] for name in names if name in encoded}
                rows.append({**row, "index": number, "labels": 0, "mask": masks[before]})
        rows.sort(key=lambda row: -len(row["input_ids"]))
        self.model.to(self.device)  # type: ignore[arg-type]
        collator, capture = Collator(self.tokenizer), Capture(self.model, Wants(logits=True))
        try:
            for start in range(0, len(rows), self.batch_size):
                part = rows[start : start + self.batch_size]
                numbers = [row["index"] for row in part]
                best = self._best(capture, collator(part), part, [places[number] for number in numbers])
                candidates[numbers, : best.shape[1]] = best
        finally:
            capture.close()
        return candidates

    def _best(
        self, capture: Capture, batch: dict[str, Tensor], rows: list[dict[str, Any]], places: list[tuple[str, int, int]]
    ) -> Tensor:
        width = batch["input_ids"].shape[1]
        batch["masked_positions"] = torch.tensor([i * width + row["mask"] for i, row in enumerate(rows)])
        batch = {name: values.to(self.device) for name, values in batch.items()}
        with capture, torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = capture.run(batch).logits
        assert logits is not None
        check_finite(logits.float().cpu(), MODEL)
        words = self.vocabulary
        # A model's table may have more rows than the tokenizer has tokens.
        scores = logits.float()[:, : len(words.texts)]
        spaced = torch.tensor([start > 0 and text[start - 1].isspace() for text, start, _ in places])
        allowed = torch.where(spaced[:, None], words.spaced, words.tight)
        for i, (text, start, end) in enumerate(places):
            allowed[i, words.same.get(text[start:end].casefold(), [])] = False
        scores = scores.masked_fill(~allowed.to(self.device), -torch.inf)
        values, best = scores.topk(min(self.top_k, scores.shape[1]))
        return torch.where(values > -torch.inf, best, NONE).to("cpu", torch.int32)


@dataclass(frozen=True)
class FillerStart:
    """The masked language model of `[task.augment]` before any work.

    training: recipe, text and start of a model that is given a masked-LM head first; None for one that has it.
    """

    source: str
    training: tuple[Recipe, Task, TeacherStart] | None = None


def start_filler(recipe: Recipe, task: Task, base: Path) -> FillerStart:
    """Return the start of the model that fills the copies of `task`. Trains and writes nothing.

    Raises InputError when there is no such model, when it has no masked-LM head and there is no usable text to give it
    one, when its tokenizer does not fit it or has no mask or no whole words, and when no row has a word to replace.
    """
    section = recipe.task.augment
    assert section is not None
    source = resolve_source(section.model, base)
    with _at(MODEL):
        headed, tokenizer = has_head(source, "masked-lm"), load_tokenizer(source)
    if not headed and section.text is None:
        raise InputError(
            f"{section.model} has no masked-LM head: it cannot say which words could stand somewhere",
            where=MODEL,
            hint="name a masked language model, such as google-bert/bert-base-uncased, or give task.augment.text: "
            "plain text to train such a head on",
        )
    if tokenizer.mask_token_id is None:
        raise InputError(f"the tokenizer of {section.model} has no mask token", where=MODEL)
    check_room(tokenizer, recipe.task.max_length, pair=False)
    Vocabulary(tokenizer)
    fields = [name for name in FIELDS if name in task.train.column_names]
    if not any(words_of(text) for name in fields for text in task.train[name]):
        raise InputError("no training row has a word that can be replaced", where="task.augment")
    if headed:
        with _at(MODEL):
            check_vocabulary(load_config(source), tokenizer)
        return FillerStart(source)
    teacher = TeacherSection(model=section.model, finetune=section.finetune or True, seed=seed_of(recipe))
    text = TaskSection(name="augment", type="text", data=section.text, max_length=recipe.task.max_length)
    speaking = recipe.model_copy(update={"teacher": teacher, "task": text})
    with _at("task.augment.text"):
        documents = load_task(text, recipe.evaluate, base=base)
    with _at(MODEL):
        start = start_teacher(speaking, documents, "masked-lm", base=base)
    with _at("task.augment.text"):
        check_encoding(documents, tokenizer, text.max_length)
    tuning = section.finetune or FinetuneSection()
    check_batch(tuning.batch_size, 1, processes(), "task.augment.finetune.batch_size")
    return FillerStart(source, (speaking, documents, start))


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
        teacher, recipe, documents, "masked-lm", console=console, refresh=refresh, resume=resume, work=work, log=log
    )
    if found.path is None:
        raise RunError(
            "the masked language model for copies could not be kept", hint="set KDCLI_CACHE to a folder with room"
        )
    return str(found.path)


def augment_task(task: Task, recipe: Recipe, source: str, *, console: Console) -> Task:
    """Return `task` with copies behind its training rows, and what was made in its description.

    source: the model, from `make_filler`. In a run over several processes the main one asks it, and the others
    read what it kept.
    Raises InputError when no row has a word that can be replaced.
    """
    section = recipe.task.augment
    assert section is not None
    model, tokenizer = load_model(source, task="masked-lm"), load_tokenizer(source)
    on_cpu = recipe.train.device == "cpu" or not torch.cuda.is_available()
    suggester = Suggester(
        model,
        tokenizer,
        top_k=section.top_k,
        batch_size=section.batch_size,
        max_length=recipe.task.max_length,
        precision=resolve_precision(recipe.train.precision, recipe.train.device),
        device=torch.device("cpu") if on_cpu else state().device,
        console=console,
    )
    fields = [name for name in FIELDS if name in task.train.column_names]
    sentences = list(dict.fromkeys(text for name in fields for text in task.train[name]))
    main_does(lambda: _fill_cache(suggester, sentences, section.model, console))
    candidates: dict[str, Tensor] = {}
    digest = hashlib.sha256()
    for chunk in _chunks(sentences):
        found = suggester.ask(chunk)
        digest.update(found.numpy().tobytes())
        candidates.update(_by_sentence(chunk, found))
    if agree(digest.hexdigest()) != digest.hexdigest():
        raise RunError(
            "the processes do not agree on the words to replace: they share no cache, and their devices differ",
            hint="set KDCLI_CACHE to a folder that all of them see",
        )
    train = add_copies(
        task.train, candidates, suggester.vocabulary, section.copies, section.probability, seed=recipe.seed
    )
    made, wanted = len(train) - len(task.train), len(task.train) * section.copies
    if not made:
        raise InputError("no training row has a word that can be replaced", where="task.augment")
    console.print(
        f"augment: {counted(len(task.train), 'row')} and {counted(made, 'copy', 'copies')}"
        + (
            f"; {counted(wanted - made, 'copy', 'copies')} left out, as too few words can change"
            if made < wanted
            else ""
        ),
        highlight=False,
        soft_wrap=True,
    )
    told = section.model_dump(exclude_none=True)
    description = {**told, "rows": len(task.train), "added": made, "left_out": wanted - made}
    return replace(task, train=train, description={**task.description, "augment": description})


def _fill_cache(suggester: Suggester, sentences: list[str], name: str, console: Console) -> None:
    missing = [chunk for chunk in _chunks(sentences) if suggester.kept(chunk) is None]
    if not missing:
        return
    count = sum(len(words_of(text)) for chunk in missing for text in chunk)
    console.print(f"augment: {name} fills in {counted(count, 'masked word')}", highlight=False, soft_wrap=True)
    told = time.monotonic()
    chunks = track(missing, "augment", console=console, disable=not console.is_terminal, transient=True)
    for done, chunk in enumerate(chunks, 1):
        suggester.make(chunk)
        if not console.is_terminal and time.monotonic() - told > 60:
            told = time.monotonic()
            console.print(f"augment: {done / len(missing):.0%}", highlight=False)


def _chunks(sentences: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(sentences), CHUNK):
        yield sentences[start : start + CHUNK]


def _by_sentence(sentences: list[str], candidates: Tensor) -> Iterator[tuple[str, Tensor]]:
    first = 0
    for text in sentences:
        count = len(words_of(text))
        yield text, candidates[first : first + count]
        first += count
