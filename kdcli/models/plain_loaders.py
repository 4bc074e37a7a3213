"""Low-rank and over-parameterised folders in plain transformers: `AutoModel...` and `pipeline` know them once kdcli is
imported.

`import kdcli` must not import transformers, which takes seconds: where that is not loaded yet, its table of families
gets kdcli's row right after it is made.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kdcli.models.heads import Head

TABLE = "transformers.models.auto.configuration_auto"
"""The module with the library's table of families."""


class _Wait:
    """A finder of modules that finds one, `TABLE`, as all others do, and has kdcli's row added when it is loaded."""

    def __init__(self, heads: "Callable[[], Iterable[Head]]") -> None:
        self.heads = heads

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if name != TABLE:
            return None
        import importlib.util

        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def and_register(module: object) -> None:
            execute(module)  # type: ignore[arg-type]
            _register(self.heads)

        spec.loader.exec_module = and_register  # type: ignore[method-assign, assignment]
        return spec


def register(heads: "Callable[[], Iterable[Head]]") -> None:
    """Let plain transformers load kdcli's own folders, now or as soon as it is imported.

    heads: gives those that their models may have.
    """
    if TABLE in sys.modules:
        _register(heads)
    elif not any(isinstance(finder, _Wait) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Wait(heads))  # type: ignore[arg-type]


def _register(heads: "Callable[[], Iterable[Head]]") -> None:
    from kdcli.models.auto import add_family

    add_family(heads)
