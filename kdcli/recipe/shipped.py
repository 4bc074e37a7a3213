"""The recipes that come with the package."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from kdcli.errors import InputError, cut

SCHEMA_FILE = "recipe.schema.json"
"""The JSON Schema that a copied recipe names, in the same folder."""

_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Shipped:
    """A recipe of the package: `name` is its path without the ending, such as `methods/kd`."""

    name: str
    path: Path

    @property
    def text(self) -> str:
        """The recipe as it is written, without the line that names its schema."""
        return "".join(line for line in self._lines if not line.startswith("#:schema"))

    @property
    def summary(self) -> str:
        """The first line of its comment."""
        comment = self.text.lstrip().partition("\n")[0]
        return comment.removeprefix("#").strip() if comment.startswith("#") else ""

    @property
    def _lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").splitlines(keepends=True)


def shipped() -> list[Shipped]:
    """Return the recipes of the package, those of no folder first.

    An installed package has them inside it; a checkout and an editable install have them beside it.
    """
    inside = _PACKAGE / "recipes"
    folder = inside if inside.is_dir() else _PACKAGE.parent / "recipes"
    found = [Shipped(path.relative_to(folder).with_suffix("").as_posix(), path) for path in folder.rglob("*.toml")]
    return sorted(found, key=lambda recipe: (recipe.name.count("/"), recipe.name))


def find(name: str) -> Shipped:
    """Return a recipe of the package by its name. Raises InputError with the nearest name where there is none."""
    found = {recipe.name: recipe for recipe in shipped()}
    wanted = name.removeprefix("recipes/").removesuffix(".toml")
    if wanted in found:
        return found[wanted]
    near = [one for one in found if one.endswith(f"/{wanted}")] or difflib.get_close_matches(wanted, found, n=1)
    raise InputError(
        f"no recipe named {cut(name)!r} comes with kdcli",
        hint=f"did you mean {near[0]}?" if near else "kdcli recipes list shows what there is",
    )
