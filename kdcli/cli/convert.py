"""kdcli convert"""

from pathlib import Path
from typing import Annotated

import typer


def convert(
    model: Annotated[str, typer.Argument(help="A model folder or hub name with a pickle.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace the folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Write the weights of pytorch_model.bin as safetensors, beside a copy of the configuration and the tokenizer.

    The pickle is read as tensors and nothing else: no code in it is run.

    \b
    Examples:
      kdcli convert old-model --out model
      kdcli convert owner/name --out model --force --json
    """
    from rich.table import Table

    from kdcli.cli.console import emit
    from kdcli.files import atomic_folder, expanded
    from kdcli.models.convert import convert_pickle
    from kdcli.runs import check_out

    out = expanded(out, "--out")
    check_out(out, model, force=force)
    with atomic_folder(out, force=force) as folder:
        document = {"folder": str(out), **convert_pickle(model, folder)}
    table = Table(show_header=False)
    for name, value in document.items():
        table.add_row(name, str(value))
    emit(document, table=table, as_json=as_json)
    return 0
