"""kdcli contract"""

from pathlib import Path
from typing import Annotated

import typer


def contract(
    model: Annotated[str, typer.Argument(help="An over-parameterised model folder.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.", show_default=False)],
    merge_lowrank: Annotated[
        bool, typer.Option("--merge-lowrank", help="Merge low-rank factors, too; the model grows again.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Multiply tensor chains back into the plain model, and check that its outputs stay equal.

    \b
    Examples:
      kdcli contract wide --out plain
      kdcli contract runs/latest/student --merge-lowrank --out dense
    """
    import torch

    from kdcli.cli import render
    from kdcli.cli.console import emit, info
    from kdcli.errors import GateError
    from kdcli.export.parity import TOLERANCE
    from kdcli.files import atomic_folder, expanded
    from kdcli.models.counts import count_parameters
    from kdcli.models.lowrank import merge_low_rank
    from kdcli.models.overparam import contract_model
    from kdcli.models.probe import probe
    from kdcli.models.processors import load_processor
    from kdcli.models.save import save_model
    from kdcli.runs import check_out
    from kdcli.tasks.heads import load_model

    out = expanded(out, "--out")
    check_out(out, model, force=force)
    with atomic_folder(out, force=force) as folder:
        loaded = load_model(model)
        processor = load_processor(model)
        before = probe(loaded)
        report = contract_model(loaded, check=False)
        if merge_lowrank:
            merge_low_rank(loaded)
        if merge_lowrank or report.matrices:
            # A product of rounded factors is not a rounded weight: the file keeps it as it is.
            loaded.config.dtype = torch.float32
            report.after = count_parameters(loaded)
        report.max_abs_difference = float((probe(loaded) - before).abs().max())
        if not report.max_abs_difference <= TOLERANCE:
            raise GateError(
                f"contraction changes the outputs by {report.max_abs_difference:.2e} (allowed {TOLERANCE:g})"
            )
        save_model(loaded, folder, processor)
    emit({"folder": str(out), **report.to_json()}, table=render.contraction(report), as_json=as_json)
    what = "nothing to contract: " if not report.matrices and not merge_lowrank else ""
    info(f"{out}: {what}outputs within {report.max_abs_difference:.1e} of {model}'s")
    return 0
