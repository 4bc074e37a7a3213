"""A whole export: graph, parity on real inputs, latency beside the teacher; the folder appears whole or not at all."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcli.errors import GateError, InputError, KdcliError
from kdcli.export.decoder import OnnxDecoder, open_graph
from kdcli.export.genai import Builder, Form, Precision, build
from kdcli.export.graph import (
    ImageModel,
    export_decoder,
    export_onnx,
    input_names,
    operators,
    other_size,
    plain_copy,
)
from kdcli.export.latency import LENGTHS, LatencyReport, Size, measure, passes, texts
from kdcli.export.parity import TOLERANCE, parity, text_parity
from kdcli.export.script import SCRIPT, script_of
from kdcli.export.session import MODEL, OnnxModel
from kdcli.files import atomic_folder
from kdcli.gates import Gate, parity_gates
from kdcli.machine import default_threads
from kdcli.models.families import family_of
from kdcli.models.heads import CAUSAL_LM, Head, head_of
from kdcli.models.probe import probe_batch
from kdcli.models.shape import shape_of, takes_any_size
from kdcli.tasks.base import Task
from kdcli.tasks.heads import heads, kind_of_model
from kdcli.tasks.kind import TaskKind
from kdcli.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel


TEXTS = 8
"""Texts that the logits of a causal language model are compared on."""

AGREEMENT = 0.9
"""Share of tokens with the same most probable next token below which a note tells of it."""


@dataclass(frozen=True)
class Checked:
    """How far a graph's outputs are from PyTorch's, and from which difference on that is too much.

    output: the one that is farthest. tolerance: None for weights of fewer bits, which give other numbers. agreement:
    the share of tokens with the same most probable next token, of a causal language model.
    """

    output: str
    difference: float
    tolerance: float | None
    agreement: float | None = None


@dataclass
class ExportResult:
    """Where the graph is, how far its outputs are from PyTorch's, and how fast both are."""

    folder: Path
    megabytes: float
    parity: Checked
    inputs: str
    operators: dict[str, int]
    latency: LatencyReport | None
    script: str | None = None
    """The name of the script in the folder that answers texts with the graph."""
    maker: str = "kdcli"
    precision: Precision = "fp32"
    notes: list[str] = field(default_factory=list)

    @property
    def difference(self) -> float:
        """The largest absolute difference of an output."""
        return self.parity.difference

    @property
    def gates(self) -> list[Gate]:
        """What the graph has passed."""
        return parity_gates(self.parity.difference, self.parity.tolerance)

    def to_json(self) -> dict[str, Any]:
        parity = {
            "max_abs_difference": self.parity.difference,
            "tolerance": self.parity.tolerance,
            "agreement": self.parity.agreement,
            "inputs": self.inputs,
        }
        return {
            "folder": str(self.folder),
            "megabytes": round(self.megabytes, 3),
            "made_by": self.maker,
            "precision": self.precision,
            "parity": parity,
            "operators": self.operators,
            "script": self.script,
            "latency": self.latency.to_json() if self.latency is not None else None,
            "notes": self.notes,
        }


def export_model(
    model: "PreTrainedModel",
    processor: Any,
    folder: Path,
    *,
    task: Task | None,
    max_length: int = 128,
    opset: int = 23,
    builder: Builder = "auto",
    precision: Precision = "fp32",
    latency: bool = True,
    batch_sizes: Sequence[int] = (1, 8),
    sequence_lengths: Sequence[int] | None = None,
    image_sizes: Sequence[Size] | None = None,
    threads: int | None = None,
    runs: int | None = None,
    teacher: "PreTrainedModel | None" = None,
    force: bool = False,
    ours: bool = False,
) -> ExportResult:
    """Export `model`, check it, time it beside PyTorch and the teacher, and keep it in `folder`.

    A causal language model gets a key-value cache; builder and precision are for it alone (see `kdcli.export.genai`).
    Where builder "auto" chose ONNX Runtime GenAI's and its graph of fp32 fails, kdcli's own exporter makes another one,
    and a note says why.
    sequence_lengths: tokens of timed texts; None takes `LENGTHS`. image_sizes: sides of timed images, of a model that
    `takes_any_size`; None takes its own.
    threads: None takes `default_threads`. runs: timed calls of each
    cell of the grid; None takes as many as `measure` chooses. Parity is checked on the task's own inputs (random ones
    without a task). Raises GateError, and leaves no folder, when an output differs by more than 1e-4 (logits over a
    vocabulary: times the largest one); InputError when the folder exists and may not be replaced (see `atomic_folder`),
    for a head that no kind of task has, or for a form that the model cannot have.
    """
    form = Form(opset, builder, precision)
    plain = plain_copy(model)
    head = head_of(plain, heads())
    if head is None:
        raise InputError(f"no type of task has the head of {type(plain).__name__}: what it gives is not known")
    form.by_builder(plain, head)
    kind = task.kind if task is not None else _kind_of(plain, processor)
    processor = kind.processor(processor) if kind is not None else processor
    batches, source = _all_batches(plain, processor, task, max_length, TEXTS if head == CAUSAL_LM else None)
    with atomic_folder(folder, force=force, ours=ours) as temporary:
        threads = threads or default_threads()
        made = _make(plain, head, processor, temporary, form, batches=batches, threads=threads)
        session, notes = made.session, made.notes
        checked = made.checked or _checked(plain, session, batches, form)
        _check_parity(checked)
        if checked.agreement is not None and checked.agreement < AGREEMENT:
            notes.append(
                f"the most probable token is the model's at only {checked.agreement:.1%} of the places: "
                "many texts will differ"
            )
        report = None
        if latency:
            models: dict[str, tuple[Any, OnnxModel | None]] = {"student": (_called(plain), session)}
            # What is killed on the way leaves all it wrote in one place.
            with tempfile.TemporaryDirectory(dir=temporary) as work:
                if teacher is not None:
                    beside = plain_copy(teacher)
                    timed = _make_teacher(beside, head, processor, Path(work), form, threads=threads)
                    models["teacher"] = (_called(beside), timed.session)
                    notes += [f"teacher: {note}" for note in timed.notes]
                shape = shape_of(plain.config)
                report = measure(
                    models,
                    batch_sizes=batch_sizes,
                    threads=threads,
                    runs=runs,
                    contest=texts if isinstance(session, OnnxDecoder) else passes,
                    **(
                        {
                            "sequence_lengths": sequence_lengths or LENGTHS,
                            "vocab_size": min(one.config.vocab_size for one, _ in models.values()),
                        }
                        if shape.image is None
                        else {"image_sizes": image_sizes or [shape.image], "channels": shape.channels}
                    ),
                )
        fields = task.fields if task is not None else None
        script = None
        try:
            script = script_of(kind, fields or kind.fields(), plain.config, processor, max_length) if kind else None
        except InputError as error:
            notes.append(f"no {SCRIPT} is written, which could not follow the image processor: {error.message}")
        if script is not None:
            (temporary / SCRIPT).write_text(script, encoding="utf-8")
        size, nodes = session.megabytes, operators(temporary / MODEL)
    return ExportResult(
        folder, size, checked, source, nodes, report, script and SCRIPT, made.maker, form.precision, notes
    )


@dataclass
class _Made:
    """A graph that can be run. checked: None where it was not compared with its model yet."""

    maker: str
    session: OnnxModel
    notes: list[str]
    checked: Checked | None = None


def _make(
    model: "PreTrainedModel",
    head: Head,
    processor: Any,
    folder: Path,
    form: Form,
    *,
    batches: list[Any],
    threads: int,
) -> _Made:
    """Write the graph of a plain model into a folder, in place of all that is there, and open it.

    A graph of fp32 by a builder that was not asked for is compared with its model on batches; where it fails, kdcli's
    own takes its place.
    """

    def attempt(form: Form) -> _Made:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        maker, notes = _write(model, head, processor, folder, form)
        return _Made(maker, open_graph(folder, threads=threads), notes)

    if not (form.by_builder(model, head) and form.builder == "auto" and form.precision == "fp32"):
        return attempt(form)
    try:
        made = attempt(form)
        made.checked = _checked(model, made.session, batches, form)
        _check_parity(made.checked)
        return made
    except KdcliError as error:
        reason = error.message
    made = attempt(replace(form, builder="kdcli"))
    made.notes.append(f"kdcli's own exporter made the graph, since that of ONNX Runtime GenAI failed: {reason}")
    return made


def _make_teacher(
    teacher: "PreTrainedModel", head: Head, processor: Any, folder: Path, form: Form, *, threads: int
) -> _Made:
    """Make the graph that a teacher is timed with: in the student's form, or in the usual one where it cannot be."""
    options: dict[str, Any] = {"batches": [probe_batch(teacher)], "threads": threads}
    try:
        return _make(teacher, head, processor, folder, form, **options)
    except KdcliError as error:
        if form == Form():
            raise
        reason = error.message
    made = _make(teacher, head, processor, folder, Form(), **options)
    made.notes.append(f"timed in fp32: {reason}")
    return made


def _check_parity(checked: Checked) -> None:
    """Raise GateError where outputs differ by more than they may."""
    if checked.tolerance is not None and not checked.difference <= checked.tolerance:
        raise GateError(
            f"{checked.output} of the exported graph differs from PyTorch's by {checked.difference:.2e} "
            f"(allowed {checked.tolerance:.2g})"
        )


def _write(model: "PreTrainedModel", head: Head, processor: Any, folder: Path, form: Form) -> tuple[str, list[str]]:
    """Write the graph of a plain model, and return what made it, and notes."""
    if head != CAUSAL_LM:
        export_onnx(model, processor, folder, opset=form.opset, outputs=head.outputs)
        return "kdcli", []
    if form.by_builder(model, head):
        return "ONNX Runtime GenAI", build(model, processor, folder, precision=form.precision)
    export_decoder(model, processor, folder, opset=form.opset)
    return "kdcli", []


def _checked(model: Any, session: OnnxModel, batches: list[Any], form: Form) -> Checked:
    """Compare a graph with its model on batches."""
    if not isinstance(session, OnnxDecoder):
        differences = parity(_called(model), session, batches)
        worst = max(differences, key=lambda name: differences[name])
        return Checked(worst, differences[worst], TOLERANCE)
    rows = [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    found = text_parity(model, session, rows[:TEXTS])
    tolerance = TOLERANCE * found.scale if form.precision == "fp32" else None
    return Checked(session.outputs[0], found.difference, tolerance, found.agreement)


def _called(model: "PreTrainedModel") -> Any:
    """Return a PyTorch model as its graph is called."""
    return ImageModel(model) if family_of(model.config).reads == "images" else model


def _kind_of(model: "PreTrainedModel", processor: Any) -> TaskKind | None:
    """Return the kind of task that a model is for; None where several fit, or none."""
    try:
        return kind_of_model(model, "the model", "MODEL", processor=processor, scored=False)
    except InputError:
        return None


def _all_batches(
    model: "PreTrainedModel", processor: Any, task: Task | None, max_length: int, most: int | None
) -> tuple[list[Any], str]:
    """Return batches, and what they are, with images of another size where the model takes any."""
    batches, source = _real_batches(model, processor, task, max_length, most)
    if not takes_any_size(model.config):
        return batches, source
    pixels = other_size(model)
    return [*batches, {"pixel_values": pixels}], f"{source}, and random ones of {pixels.shape[2]} x {pixels.shape[3]}"


def _real_batches(
    model: Any, processor: Any, task: Task | None, max_length: int, most: int | None
) -> tuple[list[Any], str]:
    """Return batches, and what they are. most: examples of a task; None takes all of its first rows."""
    if task is None:
        single = probe_batch(model)
        if "token_type_ids" not in input_names(model, processor):
            return [single], "random inputs"
        texts = processor.batch_decode(single["input_ids"], skip_special_tokens=True)
        longest = min(max_length, 2 * single["input_ids"].shape[1])
        pairs = processor(texts, texts[::-1], truncation=True, max_length=longest, padding=True, return_tensors="pt")
        return [single, dict(pairs)], "random inputs, single and in pairs"
    rows = next(iter(task.report.values()), task.selection)
    data = task.kind.encode(rows.select(range(min(64, len(rows)))), processor, max_length)
    data = data.select(range(min(most or len(data), len(data))))
    collator, size = task.kind.collator(processor), 8
    batches = [
        collator([data[i] for i in range(start, min(start + size, len(data)))]) for start in range(0, len(data), size)
    ]
    batches.append(collator([data[0]]))
    return batches, f"{counted(len(data), 'example')} of {task.name}"
