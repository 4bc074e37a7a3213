"""kdcli families"""

from typing import Annotated, Any

import typer


def families(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> int:
    """List the families of models that teachers and students can be of, and what does not work with each.

    Every form of student, [overparam], [teacher.scratch] and ONNX export work with all of them. "attention: no
    positions": attention is compared by q k^T alone, without the terms of positions that these models add.

    \b
    Examples:
      kdcli families
      kdcli families --json
    """
    from kdcli.cli import render
    from kdcli.cli.console import emit, info
    from kdcli.models.families import usable

    found, problems = usable()
    rows: list[dict[str, Any]] = [
        {
            "name": family.name,
            "title": family.title,
            "attention": f"{family.attention}, rotary" if family.rotary else family.attention,
            "feed_forward": "gated" if family.ffn_gate is not None else "plain",
            "blocks": "shared" if family.repeated else "own weights",
            "matrices": {name: matrix.path for name, matrix in family.matrices.items()},
            "limits": family.limits,
        }
        for family in found
    ]
    lines = [(row["name"], row["title"], row["attention"], "; ".join(row["limits"])) for row in rows]
    emit({"families": rows}, table=render.columns(lines, ("name", "title", "attention", "limits")), as_json=as_json)
    for problem in problems:
        info(f"left out: {problem}")
    return 0
