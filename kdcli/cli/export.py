"""kdcli export"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kdcli.cli.limits import MaxLatency


class Builder(StrEnum):
    """What makes the graph of a causal language model."""

    auto = "auto"
    genai = "genai"
    kdcli = "kdcli"


class Precision(StrEnum):
    """Weights of the graph of a causal language model."""

    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"
    int4 = "int4"


def export(
    model: Annotated[
        str | None, typer.Argument(help="A model folder, run or hub name; default: the newest run's student.")
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write ONNX: the one format that there is.")] = True,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write; default: onnx/ in the run.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="Task whose inputs parity is checked on.")] = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="Model to time beside; default: the run's teacher.")
    ] = None,
    opset: Annotated[int, typer.Option("--opset", min=20, max=23)] = 23,
    builder: Annotated[
        Builder,
        typer.Option("--builder", help="What makes a decoder's graph: ONNX Runtime GenAI's builder, or kdcli."),
    ] = Builder.auto,
    precision: Annotated[
        Precision, typer.Option("--precision", help="Weights of a decoder's graph; fewer bits by the builder.")
    ] = Precision.fp32,
    latency: Annotated[bool, typer.Option("--latency/--no-latency")] = True,
    batch_sizes: Annotated[str, typer.Option("--batch-sizes")] = "1,8",
    sequence_lengths: Annotated[
        str | None, typer.Option("--sequence-lengths", help="Tokens of timed texts; default: 16,128.")
    ] = None,
    image_sizes: Annotated[
        str | None,
        typer.Option(
            "--image-sizes", help="Sides of timed images, for models that interpolate positions; default: its own."
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Default: OMP_NUM_THREADS, or every usable core.")
    ] = None,
    runs: Annotated[
        int | None,
        typer.Option("--runs", min=1, help="Timed runs of each grid cell; default: 30, or what fits into a minute."),
    ] = None,
    max_latency_ms: MaxLatency = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Write a model as ONNX with dynamic batch and sequence or image size, check its logits, measure its latency.

    A causal language model gets a key-value cache, by the model builder of ONNX Runtime GenAI where that is installed
    (pip install 'kdcli[llm]') and knows the model, else by kdcli; its latency is the time to the first token of a text
    and to each next one.

    \b
    Examples:
      kdcli export --onnx
      kdcli export MODEL --onnx --out served --task sst2
      kdcli export MODEL --onnx --out served --precision int4 --sequence-lengths 16,128,512
      kdcli export --onnx --batch-sizes 1,32 --sequence-lengths 64 --threads 4 --max-latency-ms 8
    """
    from contextlib import nullcontext

    from kdcli.cli import render
    from kdcli.cli.choose import choose_model, choose_task, load_contestant, readable_length, warn_of_changes
    from kdcli.cli.console import emit, err, info, settle
    from kdcli.distill.record import finished
    from kdcli.errors import InputError
    from kdcli.gates import Gate
    from kdcli.terminal import warn

    if max_latency_ms is not None and not latency:
        raise InputError("needs a latency, and --no-latency measures none", where="--max-latency-ms")
    choice = choose_model(model, task)
    if out is None and not choice.is_student:
        raise InputError(f"--out DIR is needed: {choice.model} is a model outside a run", where="--out")
    grid = _numbers(batch_sizes, "--batch-sizes")
    lengths = _numbers(sequence_lengths, "--sequence-lengths") if sequence_lengths is not None else None
    sides = _numbers(image_sizes, "--image-sizes") if image_sizes is not None else None
    from kdcli.recipe.load import validate_section
    from kdcli.recipe.schema import ExportSection

    sizes = {"batch_sizes": grid, "sequence_lengths": lengths, "image_sizes": sides, "runs": runs, "threads": threads}
    times = validate_section(ExportSection, {name: value for name, value in sizes.items() if value is not None})
    from kdcli.export.export import export_model
    from kdcli.export.latency import check_grid
    from kdcli.export.session import is_onnx_folder
    from kdcli.files import expanded
    from kdcli.models.finite import at_fault
    from kdcli.runs import check_out
    from kdcli.tasks.load import load_task

    loaded, length = None, 128
    if task is not None or choice.run is not None:
        section, evaluate_section, base = choose_task(choice, task)
        loaded, length = load_task(section, evaluate_section, base=base), section.max_length
    beside = choose_model(teacher).model if teacher is not None else None
    record = finished(choice.run) if choice.run is not None else None
    if beside is None and record is not None and latency and not record.is_general:
        beside = record.teacher_path
        if beside is not None and not Path(beside).is_dir():
            info(f"the run's teacher is gone ({beside}): timing the student alone")
            beside = None
        elif beside is not None:
            warn_of_changes(beside, None)
    if out is not None:
        out = expanded(out, "--out")
        check_out(out, choice.model, beside, force=force)
    for name, where in ((choice.model, "MODEL"), (beside, "--teacher")):
        if name is not None and is_onnx_folder(Path(name)):
            raise InputError(
                f"{name} is an exported graph already", where=where, hint="name the model it was made from"
            )
    own, processor = load_contestant(choice.model)
    length = readable_length(own.config, length)
    if loaded is not None:
        loaded.kind.check(loaded, processor, length)
    models = {"model": own}
    if beside is not None:
        models["teacher"] = load_contestant(beside, "--teacher")[0]
    if latency:
        configs = {name: one.config for name, one in models.items()}
        check_grid(configs, lengths, sides, names=("--sequence-lengths", "--image-sizes"))
    inside = choice.run if out is None else None
    with at_fault("MODEL"), inside.held() if inside is not None else nullcontext():
        if inside is not None:
            inside.forget_files(inside.onnx)
        result = export_model(
            models["model"],
            processor,
            out or choice.run.onnx,  # type: ignore[union-attr]
            task=loaded,
            max_length=length,
            opset=opset,
            builder=builder.value,
            precision=precision.value,
            latency=latency,
            batch_sizes=grid,
            sequence_lengths=times.sequence_lengths,
            image_sizes=times.image_sizes,
            threads=threads,
            runs=runs,
            teacher=models.get("teacher"),
            force=force,
            # A run's own graph is made from its student: making it again loses nothing.
            ours=inside is not None,
        )
        if inside is not None:
            inside.update({"export": result.to_json()})
            inside.note_files(inside.onnx)
    document = result.to_json()
    for note in result.notes:
        info(f"note: {note}")
    gates = result.gates
    if max_latency_ms is not None and result.latency is not None:
        first = next(row for row in result.latency.rows if row["model"] == "student")
        cell = result.latency.of("student", "ONNX Runtime", first["batch"], first[result.latency.axis])
        gates.append(Gate("latency_ms", cell["p50"], max_latency_ms, at_most=True, label="p50 in ms"))
        if not cell["steady"]:
            warn(err, "--max-latency-ms is checked against an unsteady time: measure again before you rely on it")
    document["gates"] = [gate.to_json() for gate in gates]
    kept = str(inside.path / "run.json") if inside is not None else None
    emit(document, table=render.exported(result), as_json=as_json, kept=kept)
    if result.latency is not None and (doubt := result.latency.doubt()) is not None:
        warn(err, doubt)
    return settle(gates)


def _numbers(text: str, option: str) -> list[int]:
    from kdcli.errors import InputError, cut

    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise InputError(f"{option} takes whole numbers from 1 with commas, not {cut(text)!r}", where=option)
    return numbers
