"""What the layout of the code promises beside the direction of its imports, which import-linter checks."""

import ast
import subprocess
import sys
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


BY_NAME = {"augment/suggest.py", "distill/filler.py"}
"""What works with masked language models, whatever the task is: the words of copies come from one."""


def imported(tree: ast.AST) -> set[str]:
    """Return the modules that a source imports, or imports something from."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found


def test_no_kinds_module_is_imported_outside_tasks():
    modules = {type(registry.get(name)).__module__ for name in registry.names()}
    assert all(module.startswith("kdcli.tasks.") for module in modules)
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if path.parent != PACKAGE / "tasks" and imported(ast.parse(path.read_text(encoding="utf-8"))) & modules
    }
    assert found == BY_NAME


def test_a_file_in_the_folder_is_all_that_a_kind_needs(tmp_path: Path):
    kind = "from kdcli.tasks.regression import Regression\n\nclass New(Regression):\n    name = 'new'\n\nKIND = New()\n"
    (tmp_path / "new.py").write_text(kind)
    (tmp_path / "helpers.py").write_text("raise RuntimeError('this is no kind')  # KIND = 1\n")
    code = (
        f"import sys, kdcli.tasks; kdcli.tasks.__path__.append({str(tmp_path)!r})\n"
        "from kdcli.tasks import registry; print(*registry.names(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == sorted([*registry.names(), "new", "False"])
