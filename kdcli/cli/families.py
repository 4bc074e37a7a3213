"""kdcli families"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from kdcli.models.families import Family


def families(
    name: Annotated[str | None, typer.Argument(help="Explain this family.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """List the families of models that teachers and students can be of, with their limits, or explain one.

    Every form of student, [overparam], [teacher.scratch] and ONNX export work with all of them but those of which
    kdcli sees outputs only: these teach and learn predictions, and [overparam] takes the linear layers inside them.
    "attention: no positions": attention is compared by q k^T alone, without the terms of positions that these models
    add; "(some)": as their configuration says.

    \b
    Examples:
      kdcli families
      kdcli families modernbert
    """
    from kdcli.cli import render
    from kdcli.cli.console import emit, info
    from kdcli.models.families import get, usable

    if name is not None:
        family = get(name)
        document = {**_row(family), "limits_in_full": list(family.limits.values())}
        emit(document, table=render.family(document), as_json=as_json)
        return 0
    found, problems = usable()
    rows = [_row(family) for family in found]
    names = ("name", "title", "reads", "limits")
    lines = [(*(row[name] for name in names[:-1]), "; ".join(row["limits"])) for row in rows]
    emit({"families": rows}, table=render.columns(lines, names), as_json=as_json)
    for problem in problems:
        info(f"left out: {problem}")
    return 0


def _row(family: "Family") -> dict[str, Any]:
    inside = {
        "attention": _of(family, lambda one: f"{one.attention}, rotary" if one.rotary else one.attention),
        "direction": "causal" if family.causal else "both ways",
        "feed_forward": _of(family, lambda one: "gated" if one.ffn_gate is not None else "plain"),
        "blocks": "shared" if family.repeated else "own weights",
    }
    if family.outputs_only is not None:
        inside = dict.fromkeys(inside, "not seen")
    return {
        "name": family.name,
        "title": family.title,
        "reads": family.reads,
        **inside,
        "matrices": {name: matrix.path for name, matrix in family.matrices.items()},
        "limits": list(family.limits),
    }


def _of(family: "Family", read: "Callable[[Family], str]") -> str:
    """Return what models of a family have, and what others of it have by their configuration."""
    variants = (replace(family, **changes) for changes in family.variants.values())
    return " or ".join(dict.fromkeys(map(read, (family, *variants))))
