"""A whole export: graph, parity on real inputs, latency beside the teacher; the folder appears whole or not at all."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcli.errors import GateError, InputError
from kdcli.export.graph import export_onnx, input_names, operators, plain_copy
from kdcli.export.latency import LatencyReport, measure
from kdcli.export.parity import TOLERANCE, parity
from kdcli.export.script import SCRIPT, script_of
from kdcli.export.session import MODEL, OnnxModel
from kdcli.files import atomic_folder
from kdcli.machine import default_threads
from kdcli.models.heads import head_of
from kdcli.models.probe import probe_batch
from kdcli.tasks.base import Task
from kdcli.tasks.heads import heads, kind_of_model
from kdcli.tasks.kind import TaskKind
from kdcli.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class ExportResult:
    """Where the graph is, how far its outputs are from PyTorch's, and how fast both are."""

    folder: Path
    megabytes: float
    difference: float
    inputs: str
    operators: dict[str, int]
    latency: LatencyReport | None
    script: str | None = None
    """The name of the script in the folder that answers texts with the graph."""

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "megabytes": round(self.megabytes, 3),
            "parity": {"max_abs_difference": self.difference, "tolerance": TOLERANCE, "inputs": self.inputs},
            "operators": self.operators,
            "script": self.script,
            "latency": self.latency.to_json() if self.latency is not None else None,
        }


def export_model(
    model: "PreTrainedModel",
    tokenizer: Any,
    folder: Path,
    *,
    task: Task | None,
    max_length: int = 128,
    opset: int = 23,
    latency: bool = True,
    batch_sizes: Sequence[int] = (1, 8),
    sequence_lengths: Sequence[int] = (16, 128),
    threads: int | None = None,
    runs: int | None = None,
    teacher: "PreTrainedModel | None" = None,
    force: bool = False,
    ours: bool = False,
) -> ExportResult:
    """Export `model`, check it, time it beside PyTorch and the teacher, and keep it in `folder`.

    threads: None takes `default_threads`. runs: timed calls of each cell of the grid; None takes as many as `measure`
    chooses. Parity is checked on the task's own inputs (random ones without a task). Raises GateError, and leaves no
    folder, when an output differs by more than 1e-4; InputError when the folder exists and may not be replaced (see
    `atomic_folder`), or for a head that no kind of task has.
    """
    plain = plain_copy(model)
    head = head_of(model, heads())
    if head is None:
        raise InputError(f"no type of task has the head of {type(plain).__name__}: what it gives is not known")
    kind = task.kind if task is not None else _kind_of(plain, tokenizer)
    tokenizer = kind.tokenizer(tokenizer) if kind is not None else tokenizer
    batches, source = _real_batches(plain, tokenizer, task, max_length)
    with atomic_folder(folder, force=force, ours=ours) as temporary:
        export_onnx(plain, tokenizer, temporary, opset=opset, outputs=head.outputs)
        threads = threads or default_threads()
        session = OnnxModel(temporary, threads=threads)
        differences = parity(plain, session, batches)
        worst = max(differences, key=lambda name: differences[name])
        if not (difference := differences[worst]) <= TOLERANCE:
            raise GateError(
                f"{worst} of the exported graph differs from PyTorch's by {difference:.2e} (allowed {TOLERANCE:g})"
            )
        report = None
        if latency:
            # What is killed on the way leaves all it wrote in one place.
            with tempfile.TemporaryDirectory(dir=temporary) as work:
                report = _latency(
                    plain, session, teacher, tokenizer, batch_sizes, sequence_lengths, threads, runs, Path(work)
                )
        fields = task.fields if task is not None else None
        script = script_of(kind, fields or kind.fields(), plain.config, tokenizer, max_length) if kind else None
        if script is not None:
            (temporary / SCRIPT).write_text(script, encoding="utf-8")
        size, nodes = session.megabytes, operators(temporary / MODEL)
    return ExportResult(folder, size, difference, source, nodes, report, script and SCRIPT)


def _kind_of(model: "PreTrainedModel", tokenizer: Any) -> TaskKind | None:
    """Return the kind of task that a model is for; None where several fit, or none."""
    try:
        return kind_of_model(model, "the model", "MODEL", tokenizer=tokenizer, scored=False)
    except InputError:
        return None


def _real_batches(model: Any, tokenizer: Any, task: Task | None, max_length: int) -> tuple[list[Any], str]:
    if task is None:
        single = probe_batch(model)
        if "token_type_ids" not in input_names(model, tokenizer):
            return [single], "random inputs"
        texts = tokenizer.batch_decode(single["input_ids"], skip_special_tokens=True)
        longest = min(max_length, 2 * single["input_ids"].shape[1])
        pairs = tokenizer(texts, texts[::-1], truncation=True, max_length=longest, padding=True, return_tensors="pt")
        return [single, dict(pairs)], "random inputs, single and in pairs"
    rows = next(iter(task.report.values()), task.selection)
    data = task.kind.encode(rows.select(range(min(64, len(rows)))), tokenizer, max_length)
    collator, size = task.kind.collator(tokenizer), 8
    batches = [
        collator([data[i] for i in range(start, min(start + size, len(data)))]) for start in range(0, len(data), size)
    ]
    batches.append(collator([data[0]]))
    return batches, f"{counted(len(data), 'example')} of {task.name}"


def _latency(
    model: Any,
    session: OnnxModel,
    teacher: "PreTrainedModel | None",
    tokenizer: Any,
    batch_sizes: Sequence[int],
    sequence_lengths: Sequence[int],
    threads: int,
    runs: int | None,
    work: Path,
) -> LatencyReport:
    models: dict[str, tuple[Any, OnnxModel | None]] = {"student": (model, session)}
    if teacher is not None:
        beside = plain_copy(teacher)
        export_onnx(beside, tokenizer, work / "teacher", outputs=session.outputs)
        models["teacher"] = (beside, OnnxModel(work / "teacher", threads=threads))
    return measure(
        models,
        batch_sizes=batch_sizes,
        sequence_lengths=sequence_lengths,
        threads=threads,
        runs=runs,
        vocab_size=min(one.config.vocab_size for one, _ in models.values()),
    )
