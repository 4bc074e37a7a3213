"""A method from outside: a real package, installed into an environment of its own, that a recipe can name."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_recipes import tiny_recipe, write_recipe

import kdcli
from kdcli.cli.app import run
from kdcli.errors import InputError
from kdcli.methods import registry

WHEEL = {
    "distil_by_cosine-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: distil-by-cosine\nVersion: 1.0\n",
    "distil_by_cosine-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "distil_by_cosine-1.0.dist-info/entry_points.txt": "[kdcli.methods]\nby-cosine = distil_by_cosine:METHOD\n",
    "distil_by_cosine-1.0.dist-info/RECORD": "",
}
"""A package without a build step, so that it installs without a network."""

MODULE = """
from kdcli.methods.base import Context, Method, Options, Stage, Term
from kdcli.objectives.cosine import CosineObjective
from kdcli.objectives.gold import GoldObjective


class CosineOptions(Options):
    weight: float = 0.5


def build(options: CosineOptions, context: Context) -> list[Stage]:
    direction = Term("direction", CosineObjective(context.pairs), options.weight)
    return [Stage("distil", [direction, Term("task", GoldObjective(context.kind.distribution))])]


METHOD = Method(
    name="by-cosine",
    title="Directions of hidden states",
    paper="Nobody (2026): A test. arXiv 2600.00000",
    formula="w (1 - cos) + CE",
    signals="hidden states, gold labels",
    constraints="equal widths",
    cost="one teacher forward pass a step",
    options=CosineOptions,
    build=build,
    student={"form": "depth"},
    train={"learning_rate": 1e-3},
)
"""
RECIPE = tiny_recipe("student", method={"name": "by-cosine", "weight": 0.25})


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str, str], None]]:
    """Give a function that puts a package with an entry point on the path: its name, the point, the module's text."""
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.OFFERS.forget()

    def put(package: str, point: str, module: str) -> None:
        (tmp_path / f"{package}.py").write_text(module)
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[kdcli.methods]\n{point} = {package}:METHOD\n")

    yield put
    registry.OFFERS.forget()


Offer = Callable[[str, str, str], None]
UNUSABLE = {
    "a module that cannot be imported": ("offsite", "import not_there", "offsite", "No module named 'not_there'"),
    "no method": ("numeric", "METHOD = 3", "numeric", "is a int"),
    "another name than its method's": ("renamed", MODULE, "renamed", "is called 'by-cosine'"),
    "a name that is taken": ("impostor", MODULE.replace("by-cosine", "kd"), "kd", "taken by several packages: kdcli, "),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_broken_package_stops_nothing_but_its_own_method(
    case: str, offer: Offer, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    package, module, point, words = UNUSABLE[case]
    offer(package, point, module)
    assert run(["methods", "--json"]) == 0
    shown = capsys.readouterr()
    assert [row["name"] for row in json.loads(shown.out)["methods"]] == list(registry.BUILT_IN)
    assert words in shown.err and package in shown.err
    assert run(["methods", "kdd"]) == 2
    assert "unknown method 'kdd'" in capsys.readouterr().err
    if point not in registry.BUILT_IN:
        with pytest.raises(InputError, match="of the package " + package):
            registry.get(point)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of an environment with the package, and with what is installed here."""
    folder = tmp_path_factory.mktemp("outside")
    package = folder / "distil_by_cosine-1.0-py3-none-any.whl"
    with zipfile.ZipFile(package, "w") as archive:
        for name, text in {"distil_by_cosine.py": MODULE, **WHEEL}.items():
            archive.writestr(name, text)
    venv.create(folder / "env", with_pip=True)
    interpreter = folder / "env" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    where = [interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip())
    here = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(Path(kdcli.__file__).parents[1])]
    (site / "here.pth").write_text("\n".join(dict.fromkeys(here)))
    install = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", str(package)]
    subprocess.run([interpreter, *install], check=True, capture_output=True, text=True)
    return interpreter


def test_a_recipe_names_a_method_of_another_package(python: Path, tmp_path: Path):
    write_recipe(tmp_path / "recipe.toml", RECIPE)
    command = [python, "-m", "kdcli", "distill", "recipe.toml", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["method"]["name"] == "by-cosine" and record["method"]["options"] == {"weight": 0.25}
    assert not {"form", "layers", "init"} & set(record["recipe"]["student"])
    logged = record["training"][0]
    assert logged["steps"] == 2
    assert (tmp_path / "runs" / "recipe" / "student" / "model.safetensors").is_file()


def test_its_options_and_its_place_in_the_list_are_like_any_others(python: Path, tmp_path: Path):
    write_recipe(tmp_path / "r.toml", RECIPE)
    code = (
        "from kdcli.cli.app import run\n"
        "codes = [run(['methods']), run(['methods', 'by-cosine'])]\n"
        "codes.append(run(['recipes', 'explain', 'method.weight', '--method', 'by-cosine']))\n"
        "codes.append(run(['distill', 'r.toml', '--set', 'method.wait=1']))\n"
        "print(codes)"
    )
    done = subprocess.run(
        [python, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 2]", done.stderr
    assert (
        "by-cosine" in done.stdout
        and "Nobody 2026" in done.stdout
        and "arXiv 2600.00000" in done.stdout
        and "None" not in done.stdout
    )
    assert "method.wait: unknown field" in done.stderr and "did you mean" in done.stderr
