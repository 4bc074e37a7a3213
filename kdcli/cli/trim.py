"""kdcli trim"""

from pathlib import Path
from typing import Annotated

import typer


def trim(
    model: Annotated[str, typer.Argument(help="A model folder or hub name.", show_default=False)],
    text: Annotated[
        list[str],
        typer.Option(
            "--text",
            help="Text whose pieces stay: a file (.txt with a text a line, CSV, JSON lines, Parquet), a folder of "
            "such files, or a hub set. Several times for several.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.", show_default=False)],
    column: Annotated[
        list[str] | None, typer.Option("--column", help="Column of tables with text; default: text.")
    ] = None,
    keep: Annotated[
        int | None, typer.Option("--keep", min=1, max=100_000_000, help="Keep at most so many pieces, the most used.")
    ] = None,
    min_count: Annotated[
        int, typer.Option("--min-count", min=1, max=1_000_000_000, help="Keep pieces that are used so often.")
    ] = 1,
    characters: Annotated[
        bool,
        typer.Option(
            help="Keep a piece for each character of the used pieces: no new word of these characters is unknown."
        ),
    ] = True,
    held_out: Annotated[
        list[str] | None,
        typer.Option(
            "--held-out",
            help="Other text, to tell how much of it is cut otherwise; default: every tenth text, with the pieces of "
            "the others.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Leave out the pieces of a model's vocabulary that text does not use, and check that the text is read as before.

    Pieces that stay are cut, and weigh, as they did: the tokenizer gives the same pieces for all of the text, and the
    model the same outputs. Text of other words is cut into smaller pieces, and so is what --keep and --min-count leave
    out; outputs are compared on texts, or parts of them, that are read as before (max_abs_difference: null for none).

    \b
    Examples:
      kdcli trim xlm-roberta-base --text de.txt --text fr.txt --out small
      kdcli trim MODEL --text rows.csv --column message --keep 8000 --out small --json
    """
    from rich.table import Table

    from kdcli.cli.console import emit, info
    from kdcli.data.texts import check_columns, read_texts
    from kdcli.errors import RunError
    from kdcli.evaluation.score import describe_model
    from kdcli.files import atomic_folder, expanded
    from kdcli.models.hashing import hash_of_tokenizer
    from kdcli.models.heads import head_of
    from kdcli.models.load import check_vocabulary, load_config, load_tokenizer
    from kdcli.models.probe import check_numbers
    from kdcli.models.save import save_model
    from kdcli.models.vocabulary import (
        check_has_vocabulary,
        check_outputs,
        trim_vocabulary,
        trimmed,
        vocabulary_megabytes,
    )
    from kdcli.runs import check_out
    from kdcli.tasks.heads import heads, load_model

    out = expanded(out, "--out")
    check_out(out, model, *text, *(held_out or ()), force=force)
    check_has_vocabulary(load_config(model), model, where="MODEL")
    notes: list[str] = []
    if column:
        check_columns([*text, *(held_out or ())], Path(), "--column")

    def read(sources: list[str], option: str) -> list[str]:
        options: dict = {"columns": column or (), "notes": notes}
        return [one for source in sources for one in read_texts(source, Path(), option, **options)]

    texts, apart = read(text, "--text"), read(held_out, "--held-out") if held_out is not None else None
    with atomic_folder(out, force=force) as folder:
        loaded, tokenizer = load_model(model), load_tokenizer(model)
        check_vocabulary(loaded.config, tokenizer, where="MODEL")
        check_numbers(loaded, "MODEL")
        trimming = trim_vocabulary(
            tokenizer,
            loaded.config,
            texts,
            keep=keep,
            min_count=min_count,
            characters=characters,
            held_out=apart,
            told=notes,
            place=lambda field: f"--{field.replace('_', '-')}",
        )
        small, head = trimmed(loaded, trimming.kept), head_of(loaded, heads())
        assert head is not None
        both, compared = (tokenizer, trimming.tokenizer), (*trimming.sample, *trimming.parts)
        difference = check_outputs(loaded, small, both, compared, trimming.kept, head.outputs)
        save_model(small, folder, trimming.tokenizer)
        if hash_of_tokenizer(load_tokenizer(folder)) != hash_of_tokenizer(trimming.tokenizer):
            raise RunError(f"another tokenizer is read from {out} than was written there")
    sizes = [(describe_model(one), vocabulary_megabytes(one)) for one in (loaded, small)]
    document = {
        "folder": str(out),
        **trimming.to_json(),
        "parameters": [side.parameters for side, _ in sizes],
        "megabytes": [side.megabytes for side, _ in sizes],
        "vocabulary_megabytes": [megabytes for _, megabytes in sizes],
        "max_abs_difference": difference,
    }
    table = Table("", "before", "after")
    for name in ("pieces", "parameters", "megabytes", "vocabulary_megabytes"):
        before, after = document[name]
        table.add_row(name.replace("_", " "), f"{before:,}", f"{after:,}")
    for note in trimming.notes:
        info(f"note: {note}")
    emit(document, table=table, as_json=as_json)
    info(f"{out}: {trimming.compared(difference, model)}")
    return 0
