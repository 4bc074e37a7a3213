"""kdcli families"""

from typing import Annotated

import typer


def families(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> int:
    """List the families of models that teachers and students can be of.

    \b
    Examples:
      kdcli families
      kdcli families --json
    """
    from kdcli.cli import render
    from kdcli.cli.console import emit, info
    from kdcli.models.families import usable

    found, problems = usable()
    rows = [
        {
            "name": family.name,
            "title": family.title,
            "attention": family.attention,
            "feed_forward": "gated" if family.ffn_gate is not None else "plain",
            "blocks": "shared" if family.repeated else "own weights",
        }
        for family in found
    ]
    head = ("name", "title", "attention", "feed-forward", "blocks")
    emit(rows, table=render.columns([tuple(row.values()) for row in rows], head), as_json=as_json)
    for problem in problems:
        info(f"left out: {problem}")
    return 0
