"""What a teacher writes to the prompts of training rows, in parts: each is kept on disk as soon as it is there."""

import contextlib
import hashlib
import io
import json
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from rich.console import Console

from kdcli.files import cache_dir, fingerprint, remove, write_bytes
from kdcli.models.generation import Progress, Sampling, generate
from kdcli.models.hashing import hash_of_model
from kdcli.tasks.predict import placed
from kdcli.tasks.responses import prompt_of
from kdcli.terminal import tell
from kdcli.training.distributed import is_main, process, processes, shared

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

KEY = b"kdcli"

FEW = 64
"""Rows that are Python objects at the same time while their prompts are measured."""


@dataclass(frozen=True)
class Writing:
    """How responses are written. max_length: of prompt and response together. end: tokens that end a response."""

    sampling: Sampling
    max_new_tokens: int
    max_length: int
    seed: int
    end: frozenset[int]
    pad: int


def responses_to(
    rows: "Dataset",
    teacher: "PreTrainedModel",
    writing: Writing,
    *,
    batch_size: int,
    device: str,
    use_cache: bool,
    console: Console,
) -> Generator[tuple["Dataset", list[list[int]], list[list[int]]], None, None]:
    """Yield `batch_size` rows at a time, their prompts, and what a teacher writes to these; the longest prompts first.

    rows: features with `index`, `input_ids` and `labels`. Each batch has a file of its own, which is named by the
    teacher's weights and configuration, the prompts, the sampling and its seed, and appears whole or not at all: what a
    killed run has made is found again, and a damaged file is made again. Several processes take turns, a batch each;
    all of them get all responses.
    Raises NotFiniteError where the teacher's logits contain NaN or inf.
    """
    settings = {**asdict(writing), "end": sorted(writing.end), "pad": None, "format": 1}
    folder = cache_dir() / "responses" / fingerprint({"model": hash_of_model(teacher), **settings})
    progress = Progress(console if is_main() else None, len(rows), "responses")
    order = np.argsort(-np.fromiter(prompt_lengths(rows), np.int64), kind="stable")
    starts, turns, mine = range(0, len(rows), batch_size), processes(), process()

    def make(numbers: list[int], prompts: list[list[int]]) -> list[list[int]]:
        name = f"{folder.name}/{fingerprint([numbers, prompts])}"
        path = folder.parent / f"{name}.arrow"
        kept = _read(path, name, len(prompts), console) if use_cache else None
        if kept is not None:
            return kept
        found = generate(
            teacher,
            prompts,
            max_new_tokens=writing.max_new_tokens,
            max_length=writing.max_length,
            end=writing.end,
            pad=writing.pad,
            sampling=writing.sampling,
            seed=writing.seed,
            numbers=numbers,
            batch_size=len(prompts),
            owner="the teacher",
        )
        if use_cache:
            _keep(path, name, settings, numbers, found)
        return found

    with placed(teacher, device):
        for first in range(0, len(starts), turns):
            parts = [_part(rows, order[start : start + batch_size]) for start in starts[first : first + turns]]
            found: list[list[int]] | Exception | None = None
            if mine < len(parts):
                try:
                    found = make(*parts[mine][1:])
                except Exception as error:
                    # Raised at once, the other processes would wait for it.
                    found = error
            everyone = shared(found)
            for (part, _, prompts), responses in zip(parts, everyone, strict=False):
                if isinstance(responses, Exception):
                    raise responses
                assert responses is not None
                progress.add(len(prompts), sum(map(len, responses)))
                yield part, prompts, responses


def prompt_lengths(rows: "Dataset") -> Iterator[int]:
    """Yield the tokens of the prompt of every row."""
    for part in rows.select_columns(["input_ids", "labels"]).iter(FEW):
        yield from (len(prompt_of(*pair)) for pair in zip(part["input_ids"], part["labels"], strict=True))


def _part(rows: "Dataset", places: np.ndarray) -> tuple["Dataset", list[int], list[list[int]]]:
    """Return the rows of a part, their numbers, and their prompts."""
    part = rows.select(places)
    values = part.select_columns(["index", "input_ids", "labels"])[:]
    prompts = [prompt_of(*pair) for pair in zip(values["input_ids"], values["labels"], strict=True)]
    return part, values["index"], prompts


def _keep(path: Path, name: str, settings: dict, numbers: Sequence[int], responses: list[list[int]]) -> None:
    """Write a part. The cache only saves time: a full or read-only disk does not end the run."""
    table = pa.table({"index": pa.array(numbers, pa.int64()), "response": pa.array(responses, pa.list_(pa.int32()))})
    record = {"of": name, "sha256": _digest(name, responses), **settings}
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, table.schema.with_metadata({KEY: json.dumps(record)})) as writer:
        writer.write_table(table)
    with contextlib.suppress(OSError):
        if path.is_dir():
            remove(path)
        write_bytes(path, buffer.getvalue())


def _read(path: Path, name: str, rows: int, console: Console) -> list[list[int]] | None:
    """Return the responses of a part; None where there are none yet, or not as they were written."""
    try:
        with pa.ipc.open_file(pa.py_buffer(path.read_bytes())) as reader:
            table = reader.read_all()
            record = json.loads((reader.schema.metadata or {}).get(KEY, b"{}"))
        responses = table.column("response").to_pylist()
        if record.get("of") != name or len(responses) != rows:
            problem = "it was made from something else"
        elif record.get("sha256") != _digest(name, responses):
            problem = "it was changed after it was written (its SHA-256 differs)"
        else:
            return responses
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"it cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    tell(console, f"cache: {path} is made again: {problem}")
    return None


def _digest(name: str, responses: Collection[Sequence[int]]) -> str:
    return hashlib.sha256(json.dumps([name, list(responses)]).encode()).hexdigest()
