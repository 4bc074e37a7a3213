"""kdcli eval"""

import contextlib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from kdcli.cli.limits import FailUnder, FailUnderRetention

READ, WRITTEN = 128, 512
"""Tokens of a text that is read, and of prompt and response together, where neither a user nor a run says more."""


class Protocol(StrEnum):
    """Which part of the validation set is scored."""

    dev = "dev"
    half_dev = "half-dev"


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(help="A model folder, ONNX folder, run or hub name; default: the newest run's student."),
    ] = None,
    task: Annotated[str | None, typer.Option("--task", help="A task's name; default: the run's own.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Own data to score on: CSV, JSONL or Parquet.")] = None,
    text: Annotated[
        str | None, typer.Option("--text", help="Text column of --data, or two with a comma; default: the run's own.")
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(
            "--label", help="Label column of --data, or several with commas; default: the run's own, or label."
        ),
    ] = None,
    of_type: Annotated[
        str | None, typer.Option("--type", help="Type of task of --data; default: the run's own, or the model's.")
    ] = None,
    delimiter: Annotated[
        str | None, typer.Option("--delimiter", help="What separates the columns of --data; default: found out.")
    ] = None,
    encoding: Annotated[
        str | None, typer.Option("--encoding", help="Encoding of --data, such as latin-1; default: UTF-8.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            help="Names of classes, with commas: the model's own in the order of the integers in --data; or, for a "
            "model without names or with other ones, the task's words in the model's order.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="A field of the model's type of task, for --data (`kdcli tasks NAME` lists them); --text and --label "
            "are short for those of texts.",
        ),
    ] = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="A model to compare with.")] = None,
    protocol: Annotated[Protocol | None, typer.Option("--protocol")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, max=65_536)] = 64,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            min=1,
            max=1_000_000,
            help="Tokens of a text that are read; default: the run's own, or 128, of prompt and response 512.",
        ),
    ] = None,
    max_samples: Annotated[
        int | None, typer.Option("--max-samples", min=1, max=1_000_000_000, help="Score a random part only.")
    ] = None,
    fail_under: FailUnder = None,
    fail_under_retention: FailUnderRetention = None,
    by_class: Annotated[
        bool,
        typer.Option("--by-class", help="Show precision, recall and F1 of each class, which --json always has."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Score a model on a task.

    \b
    Examples:
      kdcli eval --task sst2
      kdcli eval runs/sst2-makd/onnx --task sst2 --json
      kdcli eval MODEL --task rte --teacher TEACHER --fail-under-retention 0.97
      kdcli eval --data held_out.csv --text message --label team
      kdcli eval MODEL --task sst2 --labels negative,positive
    """
    from kdcli.cli.choose import (
        as_named,
        as_options,
        check_effect,
        choose_model,
        choose_task,
        names_with_commas,
        section_of_data,
        teacher_of_run,
    )
    from kdcli.cli.console import emit, info, settle
    from kdcli.errors import InputError

    if data is not None:
        from kdcli.files import expanded

        data = expanded(data, "--data")
        both = {"--task": task, "--protocol": protocol}
        if given := [option for option, value in both.items() if value is not None]:
            raise InputError(f"scores a file, without {' and '.join(given)}", where="--data")
    elif given := [
        option
        for option, value in {
            "--text": text,
            "--label": label,
            "--type": of_type,
            "--delimiter": delimiter,
            "--encoding": encoding,
            "--set": set_,
        }.items()
        if value is not None
    ]:
        raise InputError("needs --data FILE", where=given[0])
    names = names_with_commas(labels, "--labels") if labels is not None else None
    choice = choose_model(model, task)
    of_run = fail_under_retention is not None and teacher is None
    if of_run:
        teacher = teacher_of_run(choice, "--fail-under-retention", "name a model to compare with: --teacher MODEL")
    base = Path()
    if data is None:
        section, evaluate_section, base = choose_task(choice, task, protocol=protocol.value if protocol else None)
    else:
        own = choose_task(choice, None)[0] if choice.run is not None else None
        section = section_of_data(
            data,
            own,
            text=text,
            label=label,
            delimiter=delimiter,
            encoding=encoding,
            of_type=of_type,
            changes=set_ or (),
        )
    from dataclasses import replace

    from rich.console import Group
    from rich.table import Table

    from kdcli.cli import render
    from kdcli.cli.choose import length_for, load_contestant
    from kdcli.distill.record import finished
    from kdcli.evaluation.result import labelled, mean_over_sets
    from kdcli.evaluation.score import evaluate_model, primary_score
    from kdcli.gates import Limits
    from kdcli.models.finite import at_fault
    from kdcli.tasks.base import Owner
    from kdcli.tasks.by_class import ByClass, plain_by_class
    from kdcli.tasks.heads import check_head, kind_of_model, typed_for
    from kdcli.tasks.kind import TaskKind
    from kdcli.tasks.load import load_rows, load_task
    from kdcli.tasks.metrics import is_error, names_of, retention_of, shown, shown_of
    from kdcli.terminal import stderr

    contestant, processor = load_contestant(choice.model)
    # What a user says that the outputs of a model are called.
    called: dict[str, list[str] | None] = {}
    if data is not None:
        with as_options(set_ or (), of_file=True):
            of_the_run = finished(choice.run).task.kind if choice.run is not None else None
            kind = kind_of_model(
                contestant, choice.model, "MODEL", processor=processor, wanted=of_type, usual=of_the_run
            )
            check_effect(kind, set_ or ())
            usual = WRITTEN if kind.generates else READ
            section = section.model_copy(update={"max_length": own.max_length if own is not None else usual})
            loaded = load_rows(section, kind, contestant.config, names=names, limit=max_samples)
    else:
        called["MODEL"] = names
        section = typed_for(section, contestant)
        with as_named() if task is not None else contextlib.nullcontext():
            loaded = replace(load_task(section, evaluate_section, base=base, limit=max_samples), trains=False)
    if not loaded.report:
        raise InputError(
            f"{loaded.name} has nothing to score a model with",
            where="--task",
            hint="give the --task NAME of a set with gold answers, or --data FILE",
        )
    if by_class and type(loaded.kind).by_class is TaskKind.by_class:
        raise InputError(f"a task of type {loaded.kind.name} has no classes", where="--by-class")
    for note in loaded.notes:
        info(f"note: {note}")
    models = {"student" if teacher else "score": (choice.model, contestant, processor)}
    if teacher is not None:
        beside = choose_model(teacher, task).model
        models["teacher"] = (beside, *load_contestant(beside, "--teacher"))
        if of_run and choice.recipe is not None and (named := choice.recipe.teacher.labels) is not None:
            called["--teacher"] = named
    document: dict = {"task": loaded.name, "primary": loaded.primary, "metrics": {}}
    scores: dict[str, float] = {}
    classes: dict[str, ByClass] = {}
    fewer: dict[str, dict[str, int]] = {}
    for role, (name, one, words) in models.items():
        limit = length_for(one.config, name, max_length, section.max_length)
        place = "MODEL" if one is contestant else "--teacher"
        check_head(one, loaded.kind.head, name, place)
        owner = Owner(
            name,
            place,
            "--labels" if one is contestant else None,
            "score it on data of the kind that it was trained on",
        )
        aligned = loaded.kind.align(one, loaded.label_names, owner, called.get(place))
        for note in owner.notes:
            info(f"note: {note}")
        if of_run and choice.run is not None and one is not contestant:
            # As it was scored in the run, where its outputs had this order.
            aligned.config.update(finished(choice.run).teacher_settings)
        with as_options(set_ or (), of_file=data is not None):
            loaded.kind.check(loaded, words, limit)
        for note in loaded.kind.remarks_on_report(loaded, words, limit):
            info(f"note: {note}" if teacher is None else f"note: {role}: {note}")
        with at_fault(place):
            options: dict[str, Any] = {"max_length": limit, "owner": name, "console": stderr()}
            each: ByClass = {}
            values = evaluate_model(aligned, words, loaded, batch_size=batch_size, by_class=each, **options)
        if each:
            classes[role] = each
            document["by_class" if role != "teacher" else "teacher_by_class"] = plain_by_class(each)
        fewer = fewer or loaded.fewer(words, limit)
        scores[role] = primary_score(values, loaded.primary)
        document["metrics" if role != "teacher" else "teacher_metrics"] = values
        document["model" if role != "teacher" else "teacher"] = name
    sides = {"metrics": "mean", "teacher_metrics": "teacher_mean"}
    means = {to: mean_over_sets(document[key]) for key, to in sides.items() if key in document}
    document |= {name: values for name, values in means.items() if values}
    document["rows"] = loaded.scored
    if fewer:
        document["fewer"] = fewer
    score = next(iter(scores.values()))
    document["score"] = score
    if teacher is not None:
        document["teacher_score"] = scores["teacher"]
        document["retention"] = retention_of(loaded.primary, score, scores["teacher"])
    table = Table("", *models, title=f"{loaded.name}: {choice.model}")
    for name, metrics in document["metrics"].items():
        for metric in names_of(metrics):
            row = [shown_of(metrics, metric)]
            if teacher is not None:
                row.append(shown_of(document["teacher_metrics"][name], metric))
            table.add_row(labelled(metric, name, document["rows"][name], fewer.get(name)), *row)
    for metric in means["mean"]:
        cells = [shown(metric, values[metric]) for values in means.values()]
        table.add_row(f"{metric} (mean of {len(loaded.report)} sets)", *cells)
    limits = Limits(fail_under, fail_under_retention)
    gates = limits.gates(loaded.primary, score, document.get("retention"), error=is_error(loaded.primary))
    shown_tables = Group(table, *(render.by_class(classes) if by_class else []))
    emit({**document, "gates": [gate.to_json() for gate in gates]}, table=shown_tables, as_json=as_json)
    return settle(gates)
