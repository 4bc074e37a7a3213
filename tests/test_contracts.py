"""What the layout of the code promises beside the direction of its imports, which import-linter checks."""

import ast
from collections.abc import Iterator
from pathlib import Path

import kdcli
from kdcli.tasks import registry

PACKAGE = Path(kdcli.__file__).parent
TYPES = {"kind", "type"}
"""Names of what may hold the name of a kind."""


def names_in(node: ast.expr) -> set[str]:
    """Return the texts of a constant, or of a tuple, list or set of constants."""
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return {name for part in node.elts for name in names_in(part)}
    return {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()


def last_name(node: ast.expr) -> str | None:
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return str(node.slice.value)
    return node.id if isinstance(node, ast.Name) else None


def decisions(tree: ast.AST, kinds: set[str]) -> Iterator[int]:
    """Yield the lines that decide something by a kind's name: a comparison, a `match`, a dictionary looked up by it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            about = any(last_name(side) in TYPES for side in sides)
            texts = {name for side in sides for name in names_in(side)}
            if texts & kinds and (about or texts & (kinds - {"text"})):
                yield node.lineno
        elif isinstance(node, ast.MatchValue) and names_in(node.value) & kinds:
            yield node.value.lineno
        elif isinstance(node, ast.Dict):
            keys = {name for key in node.keys if key is not None for name in names_in(key)}
            if len(keys & kinds) > 1:
                yield node.lineno


def test_a_decision_by_a_kinds_name_is_found():
    kinds = {"classification", "regression", "text"}
    for line in (
        'if kind == "text": pass',
        'x = task.kind in ("classification", "regression")',
        'y = record["task"]["kind"] != "text"',
        'if "regression" == found: pass',
        'match task.type:\n    case "text": pass',
        'z = {"classification": 1, "regression": 2}[kind]',
    ):
        assert list(decisions(ast.parse(line), kinds)), line
    for line in ('if column == "text": pass', 'kind = "text"', 'x = {"text": rows}', "if kind == other.kind: pass"):
        assert not list(decisions(ast.parse(line), kinds)), line


def test_no_decision_by_a_kinds_name_outside_tasks():
    kinds = set(registry.names())
    found = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parent != PACKAGE / "tasks"
        for line in decisions(ast.parse(path.read_text(encoding="utf-8")), kinds)
    ]
    assert not found, "ask the kind instead (kdcli.tasks.kind.TaskKind): " + ", ".join(found)
