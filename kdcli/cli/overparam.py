"""kdcli overparam"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Factorization(StrEnum):
    """How a matrix becomes a chain."""

    mpo = "mpo"
    svd = "svd"
    svd_plain = "svd-plain"


class Gauge(StrEnum):
    """How singular values are shared along the chain."""

    symmetric = "symmetric"
    left = "left"


def overparam(
    model: Annotated[str, typer.Argument(help="A model folder or hub name.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.", show_default=False)],
    length: Annotated[int, typer.Option("--length", "-L", min=0, help="Number of middle tensors.")] = 3,
    scale: Annotated[
        float | None, typer.Option("--scale", help="Weights per matrix weight, instead of a length.")
    ] = None,
    factorization: Annotated[Factorization, typer.Option("--factorization")] = Factorization.mpo,
    targets: Annotated[str, typer.Option("--targets", help="attention, ffn, or both with a comma.")] = "attention,ffn",
    layers: Annotated[str, typer.Option("--layers", help="all, or block numbers from 0 with commas.")] = "all",
    factors: Annotated[
        Path | None,
        typer.Option("--factors", help='TOML or JSON file: dimension -> factors, "768" = [32, 1, 24].'),
    ] = None,
    gauge: Annotated[Gauge, typer.Option("--gauge")] = Gauge.symmetric,
    svd_dtype: Annotated[str, typer.Option("--svd-dtype", help="float32 or float64.")] = "float64",
    force: Annotated[bool, typer.Option("--force", help="Replace the folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Put a chain of tensors in place of every block matrix (OPDF); the model's function does not change.

    \b
    Examples:
      kdcli overparam runs/latest/student --out wide
      kdcli overparam google-bert/bert-base-uncased --length 5 --targets ffn --out wide
      kdcli overparam MODEL --factorization svd --out wide --json
    """
    from kdcli.errors import GateError, InputError
    from kdcli.recipe.load import validate_section
    from kdcli.recipe.schema import OverparamSection

    try:
        numbers = None if layers == "all" else [int(part) for part in layers.split(",")]
    except ValueError:
        raise InputError(f"--layers takes all or numbers with commas, not {layers!r}", where="--layers") from None
    section = validate_section(
        OverparamSection,
        {
            "length": length,
            "scale": scale,
            "factorization": factorization.value,
            "targets": [part.strip() for part in targets.split(",")],
            "layers": numbers,
            "factors": _read_factors(factors) if factors is not None else None,
            "gauge": gauge.value,
            "svd_dtype": svd_dtype,
        },
    )
    from kdcli.cli import render
    from kdcli.cli.console import emit, info
    from kdcli.export.parity import TOLERANCE
    from kdcli.files import atomic_folder, expanded
    from kdcli.models.overparam import overparameterise
    from kdcli.models.probe import probe
    from kdcli.models.processors import load_processor
    from kdcli.models.save import save_model
    from kdcli.runs import check_out
    from kdcli.tasks.heads import load_model

    # The folder first: that it exists already should not be said after minutes of work.
    out = expanded(out, "--out")
    check_out(out, model, factors, force=force)
    with atomic_folder(out, force=force) as folder:
        loaded = load_model(model)
        processor = load_processor(model)
        before = probe(loaded)
        report = overparameterise(loaded, section)
        difference = float((probe(loaded) - before).abs().max())
        if not difference <= TOLERANCE:
            raise GateError(f"the chains change the outputs by {difference:.2e} (allowed {TOLERANCE:g})")
        save_model(loaded, folder, processor)
    emit(
        {"folder": str(out), "max_abs_difference": difference, **report.to_json()},
        table=render.chains(report),
        as_json=as_json,
    )
    for name in report.skipped:
        info(f"left as it is: {name}")
    info(f"{out}: outputs within {difference:.1e} of the plain model's; kdcli contract {out} brings it back")
    return 0


def _read_factors(path: Path) -> dict[str, list[int]]:
    import json

    from kdcli.errors import InputError
    from kdcli.recipe.toml import BrokenTOML, parse, read_text

    text = read_text(path, "file of factors")
    try:
        return json.loads(text) if path.suffix == ".json" else parse(text)
    except BrokenTOML as error:
        raise InputError(f"{path}:{error.line} is not valid TOML: {error.reason}", where="--factors") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}", where="--factors") from error
