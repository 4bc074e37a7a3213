"""kdcli predict"""

import contextlib
import os
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli.cli.limits import finite
from kdcli.words import counted

if TYPE_CHECKING:
    from kdcli.cli.choose import Choice
    from kdcli.evaluation.answerer import Answerer
    from kdcli.recipe.schema import TaskSection
    from kdcli.tasks.generated import Writing
    from kdcli.tasks.kind import TaskKind


NEW_TOKENS = 256
"""Of a generated text, where neither a user nor a run says how many."""
IMAGES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".avifs"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    *(".tga", ".icb", ".vda", ".vst"),
)
"""How names of files end that are examples, though they stand where a model may; Pillow's own list is not loaded."""
MARKS = ("config.json", "run.json", "model.onnx")
"""Files that the folder of a model, a run or a graph has."""
MOST_TOKENS = 1_000_000
"""That are read of a prompt, where a model has no positions of its own."""


class Device(StrEnum):
    """Where a PyTorch model computes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def predict(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [TEXT]...",
            help="A model folder, ONNX folder, run or hub name; default: the newest run's student. Then texts, each in "
            'quotes, or files and folders of images; "-" reads them from standard input, one a line.',
            show_default=False,
        ),
    ] = None,
    input_: Annotated[
        str | None,
        typer.Option(
            "--input",
            "-i",
            metavar="FILE",
            help='The examples: a .txt file with one text a line, CSV, JSONL or Parquet; "-" is standard input. Of '
            "images, paths that start at the file's folder, or encoded bytes; or a folder of images.",
        ),
    ] = None,
    json_input: Annotated[
        bool, typer.Option("--json-input", help="Lines of standard input are JSON: objects, or texts.")
    ] = False,
    text: Annotated[
        str | None, typer.Option("--text", help="Text column of --input, or two with a comma; default: the run's own.")
    ] = None,
    pair: Annotated[bool, typer.Option("--pair", help="Each example is a pair of texts.")] = False,
    with_: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="NAME=TEXT",
            help="An input that is the same for all examples, such as context=@story.txt (@: the text of a file).",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="A field of the model's type of task (`kdcli tasks NAME` lists them), such as the column of an input.",
        ),
    ] = None,
    of_type: Annotated[
        str | None, typer.Option("--type", help="Type of task; default: the run's own, or the model's.")
    ] = None,
    delimiter: Annotated[
        str | None, typer.Option("--delimiter", help="What separates the columns of --input; default: found out.")
    ] = None,
    encoding: Annotated[
        str | None, typer.Option("--encoding", help="Encoding of --input, such as latin-1; default: UTF-8.")
    ] = None,
    beside: Annotated[
        str | None,
        typer.Option(
            "--beside",
            metavar="MODEL",
            help='A second model that answers, too, and whether both agree; "teacher" is the run\'s own.',
        ),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(
            "--top",
            min=1,
            max=1_000_000,
            help="List the best answers, at most this many, by probability; a threshold may have chosen another.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            min=1,
            max=1_000_000,
            help="Tokens of a generated text; default: the run's own, or 256.",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            min=0.0,
            max=1_000.0,
            callback=finite,
            help="Draw a generated text at this temperature; default: 0, the most probable token each time.",
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, max=1_000_000, help="Draw from as many most probable tokens.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            min=1e-6,
            max=1.0,
            callback=finite,
            help="Draw from the fewest tokens that have this share of the probability.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, max=2**32 - 1, help="Of what is drawn; default: 0.")
    ] = None,
    echo: Annotated[
        bool,
        typer.Option("--echo", help="Write the inputs before each reply; files that are no table are named anyway."),
    ] = False,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, max=65_536, help="1 answers each line of a pipe as it comes.")
    ] = 64,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            min=1,
            max=1_000_000,
            help="Tokens of a text that are read; default: the run's own, or 128; of a prompt, all that the model has "
            "positions for.",
        ),
    ] = None,
    device: Annotated[Device, typer.Option("--device")] = Device.auto,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write .jsonl, .csv or, for embeddings, .npy."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines: one document an example.")] = False,
) -> int:
    """Answer texts, or images, with a model.

    \b
    Examples:
      kdcli predict "a fine film"
      kdcli predict runs/sst2-makd "a fine film" "a dull one" --beside teacher
      kdcli predict runs/qa "Who wrote it?" --with context=@story.txt --top 3
      jq -r .text rows.jsonl | kdcli predict MODEL - --json
      kdcli predict MODEL --input rows.csv --text message --output replies.csv
      kdcli predict runs/embeddings --input texts.txt --output vectors.npy
      kdcli predict runs/pictures cat.jpg photos --top 5
      kdcli predict runs/instruct "Name three rivers." --temperature 0.7 --seed 1
    """
    from kdcli.errors import InputError
    from kdcli.files import expanded
    from kdcli.recipe.load import parts_of

    model, texts = _model_and_texts(arguments or [])
    if texts and input_ is not None:
        raise InputError("reads the examples, without texts among the arguments", where="--input")
    if texts == ["-"]:
        texts, input_ = [], "-"
    if not texts and input_ is None and not with_:
        raise InputError(
            "nothing to answer",
            where="TEXT",
            hint='give texts, files or folders of images, --input FILE, or "-" for standard input; a text of one word '
            "needs MODEL before it",
        )
    for number, words in enumerate(texts, 1):
        if not words.strip():
            raise InputError(f"text {number} is empty", where="TEXT", hint='put each text in quotes: "a fine film"')
    if "labels" in {parts_of(change, "--set", "text=message")[0][0] for change in set_ or ()}:
        raise InputError("labels has no effect: a model answers with its own labels", where="--set labels")
    place = expanded(input_, "--input") if input_ not in (None, "-") else None
    of_lines = input_ == "-" or (place is not None and place.suffix.lower() == ".txt")
    of_table = place is not None and not (of_lines or place.is_dir() or _is_image(place.name))
    for option, given, fits, needs in (
        ("--text", text is not None, of_table, "--input FILE with columns"),
        ("--delimiter", delimiter is not None, of_table, "--input FILE with columns"),
        ("--encoding", encoding is not None, input_ is not None, "--input FILE"),
        ("--json-input", json_input, input_ == "-", "standard input"),
        ("--force", force, output is not None, "--output FILE"),
    ):
        if given and not fits:
            raise InputError(f"needs {needs}", where=option)
    if pair and text is not None:
        raise InputError("the columns of a pair are two with a comma, without --pair", where="--text")
    from kdcli.cli.predict_outputs import check_output

    if output is not None:
        output = expanded(output, "--output")
        check_output(output, place, force=force)
    from kdcli.cli.choose import check_effect, choose_model, choose_task, section_of_data
    from kdcli.cli.predict_inputs import fixed_inputs

    fixed = fixed_inputs(with_ or ())
    choice = choose_model(model)
    own = choose_task(choice, None)[0] if choice.run is not None else None
    section = section_of_data(
        place or Path("texts"),
        own,
        text="text,text_pair" if pair else text,
        label=None,
        delimiter=delimiter,
        encoding=encoding,
        of_type=of_type,
        changes=set_ or (),
    )
    second = _second_model(choice, beside) if beside is not None else None
    from kdcli.cli.console import emit, info
    from kdcli.cli.predict_inputs import Examples, as_given
    from kdcli.cli.predict_outputs import Agreement, Row, output_file, stdout_lines
    from kdcli.models.finite import at_fault

    usual = own.max_length if own is not None else section.max_length
    how: dict[str, Any] = {"max_length": max_length, "usual": usual, "batch_size": batch_size, "device": device.value}
    with as_given(set_ or (), of_table=of_table):
        answerer, fields = _answerer(choice, of_type, section, own, **how)
    check_effect(answerer.kind, set_ or ())
    other = _answerer_beside(answerer, *second, **how) if second is not None else None
    kind, agreement, count = answerer.kind, Agreement(), 0
    drawing = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    with as_given(set_ or (), of_table=of_table):
        writing = _writing(kind, fields, max_new_tokens, drawing)
    answerer = replace(answerer, writing=writing)
    other = replace(other, writing=writing) if other is not None else None
    if top is not None and not kind.ranks:
        raise InputError(f"{kind.name} models give one answer, without others to list", where="--top")
    # A folder has as many replies as images; those of texts and tables stand in the order of what is given.
    echo = echo or (kind.typed_as_files and not of_table)
    with contextlib.ExitStack() as stack:
        stack.enter_context(as_given(set_ or (), of_table=of_table))
        examples = Examples(kind, fields, fixed)
        # Many together are sorted by length; what comes through a pipe is not kept waiting.
        size = batch_size if input_ == "-" or kind.generates else 16 * batch_size
        if of_lines:
            parts = examples.of_lines(input_ or "", encoding, size, as_json=json_input)
        else:
            rows = examples.of_file(place, section) if place is not None else examples.of_texts(texts)
            parts = (rows.slice(start, size) for start in range(0, len(rows), size))
        if output is not None:
            write = stack.enter_context(output_file(output, kind, echo=echo, beside=other is not None))
        else:
            write = stack.enter_context(stdout_lines(as_json=as_json, echo=echo))
        for part in parts:
            while examples.notes:
                info(f"note: {examples.notes.pop(0)}")
            with at_fault("MODEL"):
                replies = answerer.replies(part, top=top, first=count)
            theirs: list[dict[str, Any] | None] = [None] * len(replies)
            if other is not None:
                with at_fault("--beside"):
                    theirs = [*other.replies(part, top=top, first=count)]
            answered = [Row(kind, *row) for row in zip(examples.shown(part), replies, theirs, strict=True)]
            write(answered)
            count += len(answered)
            agreement.add(answered)
    if output is not None:
        document = {"model": answerer.name, "output": str(output), "rows": count}
        emit(document, table=f"{output}: {counted(count, 'row')}", as_json=as_json)
    for words in agreement.told():
        info(words)
    return 0


def _writing(kind: "TaskKind", fields: Any, tokens: int | None, drawing: dict[str, Any]) -> "Writing | None":
    """Return how texts are written; None where the kind's models write none. tokens, drawing: what is asked for.

    Raises InputError for options without effect.
    """
    from kdcli.errors import InputError
    from kdcli.tasks.generated import Writing

    given = {name: value for name, value in drawing.items() if value is not None}
    if not kind.generates:
        if asked := [*(["max_new_tokens"] if tokens is not None else []), *given]:
            raise InputError(f"{kind.name} models write no texts", where=_option(asked[0]))
        return None
    tokens = tokens or getattr(fields, "max_new_tokens", None) or NEW_TOKENS
    temperature = given.pop("temperature", 1.0 if given.keys() - {"seed"} else 0.0)
    if not temperature and given:
        raise InputError(
            "has no effect: nothing is drawn", where=_option(next(iter(given))), hint="give --temperature 1, too"
        )
    return Writing(tokens, temperature, **given)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _second_model(choice: "Choice", beside: str) -> tuple[str, list[str] | None, dict[str, Any]]:
    """Return the model of `--beside`, what its outputs are called, and what its run decided about it."""
    from kdcli.cli.choose import choose_model, teacher_of_run
    from kdcli.distill.record import finished

    if beside != "teacher":
        return choose_model(beside).model, None, {}
    name = teacher_of_run(choice, "--beside", "name it: --beside MODEL", scored=False)
    assert choice.run is not None and choice.recipe is not None
    return name, choice.recipe.teacher.labels, finished(choice.run).teacher_settings


def _answerer(
    choice: "Choice", wanted: str | None, section: "TaskSection", own: "TaskSection | None", **how: Any
) -> "tuple[Answerer, Any]":
    """Return the model that answers, and the fields of its kind. own: the task of its run; how: as `_asked` takes it.

    Its fields, and those of the set that it names, count where `section` has none.
    """
    from kdcli.cli.choose import load_contestant
    from kdcli.distill.record import finished
    from kdcli.tasks import registry
    from kdcli.tasks.heads import kind_of_model

    model, processor = load_contestant(choice.model)
    of_the_run = finished(choice.run).task.kind if choice.run is not None else None
    kind = kind_of_model(
        model, choice.model, "MODEL", processor=processor, wanted=wanted, usual=of_the_run, scored=False
    )
    if own is not None:
        named = registry.set_of(own)
        given = {**(named.fields if named is not None and named.kind == kind.name else {}), **own.fields}
        known = {name: value for name, value in given.items() if name in kind.fields.model_fields}
        section = section.model_copy(update={**known, **section.fields})
    fields = registry.fields_of(kind, section)
    return _asked(choice.model, kind.with_fields(fields), model, processor, **how), fields


def _answerer_beside(
    first: "Answerer", name: str, called: list[str] | None, settings: dict[str, Any], **how: Any
) -> "Answerer":
    """Return a second model with the answers of the first one. called, settings: of `_second_model`."""
    from kdcli.cli.choose import load_contestant
    from kdcli.cli.console import info
    from kdcli.models.classes import class_names_of
    from kdcli.tasks.base import Owner
    from kdcli.tasks.heads import check_head

    kind, where = first.kind, "--beside"
    model, processor = load_contestant(name, where)
    check_head(model, kind.head, name, where)
    owner = Owner(name, where, None, "name a model that was trained on the same task")
    model = kind.align(model, class_names_of(first.model.config), owner, called)
    model.config.update(settings)
    for note in owner.notes:
        info(f"note: {note}")
    return _asked(name, kind, model, processor, **how)


def _asked(
    name: str, kind: "TaskKind", model: Any, processor: Any, *, max_length: int | None, usual: int, **how: Any
) -> "Answerer":
    """Return a model as it is asked. max_length: what the user wants. usual: tokens of a text otherwise."""
    from kdcli.cli.choose import length_for
    from kdcli.errors import InputError
    from kdcli.evaluation.answerer import Answerer
    from kdcli.export.session import OnnxModel
    from kdcli.models.shape import longest_input

    if how["device"] == Device.cuda.value and isinstance(model, OnnxModel):
        raise InputError(
            f"{name} is an ONNX folder, which answers on the CPU", where="--device", hint="leave out --device cuda"
        )
    if kind.generates:
        usual = longest_input(model.config) or MOST_TOKENS
    return Answerer(name, kind, model, processor, length_for(model.config, name, max_length, usual), **how)


def _model_and_texts(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Return the model and the texts among the arguments. What cannot name a model is a text."""
    if not arguments:
        return None, []
    first, *rest = arguments
    # No hub name has a space in it; a folder's name may.
    if first == "-" or ((not first.strip() or len(first.split()) > 1) and not os.path.lexists(first)):
        return None, arguments
    if (_is_image(first) and os.path.isfile(first)) or _has_images_alone(first):
        return None, arguments
    return first, rest


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGES)


def _has_images_alone(folder: str) -> bool:
    """Return whether a folder, if it is one, holds images, in whatever depth, and neither a model nor a run."""
    if any(os.path.exists(os.path.join(folder, name)) for name in MARKS):
        return False
    return any(_is_image(name) for _, _, names in os.walk(folder) for name in names)
