"""What other packages offer by entry points: methods, families, kinds of tasks."""

from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from kdcli.errors import InputError

T = TypeVar("T")


class Offers(Generic[T]):
    """The objects that other packages offer in one group of entry points, by name; loaded when they are asked for.

    noun: what one of them is. kind: its class, whose objects have a `name`. built_in: kdcli's own names.
    where: the recipe's field that names one.
    """

    def __init__(
        self, group: str, noun: str, kind: type[T], built_in: Collection[str], *, where: str | None = None
    ) -> None:
        self.group, self.noun, self.kind, self.built_in, self.where = group, noun, kind, built_in, where
        self._points: dict[str, list[EntryPoint]] | None = None

    def points(self) -> dict[str, list[EntryPoint]]:
        """Return the entry points by name, in the order of names; none of them is loaded."""
        if self._points is None:
            self._points = {}
            for point in sorted(entry_points(group=self.group)):
                self._points.setdefault(point.name, []).append(point)
        return self._points

    def forget(self) -> None:
        """Read the installed packages once more when a name is asked for next."""
        self._points = None

    def names(self) -> list[str]:
        """Return kdcli's own names, then those of other packages."""
        return [*self.built_in, *(name for name in self.points() if name not in self.built_in)]

    def __contains__(self, name: object) -> bool:
        return name in self.points()

    def load(self, name: str) -> T:
        """Return what an entry point offers. Raises InputError that names the package when it cannot be used."""
        point, *others = self.points()[name]
        if others or name in self.built_in:
            owners = ["kdcli"] * (name in self.built_in) + [_package(entry) for entry in (point, *others)]
            raise InputError(f"the name {name!r} is taken by several packages: {', '.join(owners)}", where=self.where)
        source = f"the {self.noun} {name!r} of the package {_package(point)}"
        try:
            found = point.load()
        except Exception as error:
            raise InputError(
                f"{source} cannot be loaded ({type(error).__name__}: {error})",
                where=self.where,
                hint="install what it needs, or remove the package",
            ) from error
        if not isinstance(found, self.kind) or found.name != name:  # type: ignore[attr-defined]
            is_one = isinstance(found, self.kind)
            what = f"is called {found.name!r}" if is_one else f"is a {type(found).__name__}"  # type: ignore[attr-defined]
            raise InputError(
                f"{source} {what}; {point.value} must be a {self.kind.__module__}.{self.kind.__name__} with the entry "
                "point's name",
                where=self.where,
            )
        return found

    def usable(self) -> tuple[list[T], list[str]]:
        """Return all offers that can be used, and a line for each of the others."""
        found, problems = [], []
        for name in self.points():
            try:
                found.append(self.load(name))
            except InputError as error:
                problems.append(error.message)
        return found, problems


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value
