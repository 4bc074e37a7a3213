"""Low-rank and over-parameterised folders in plain transformers: `AutoModel...` and `pipeline` know them once kdcli is
imported.

`import kdcli` must not import transformers, which takes seconds: where that is not loaded yet, its table of families
gets kdcli's row right after it is made.
"""

import sys

TABLE = "transformers.models.auto.configuration_auto"
"""The module with the library's table of families."""


class _Wait:
    """A finder of modules that finds one, `TABLE`, as all others do, and has kdcli's row added when it is loaded."""

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
            _register()

        spec.loader.exec_module = and_register  # type: ignore[method-assign, assignment]
        return spec


def register() -> None:
    """Let plain transformers load kdcli's own folders, now or as soon as it is imported."""
    if TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Wait) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Wait())  # type: ignore[arg-type]


def _register() -> None:
    from kdcli.models.auto import add_family

    add_family()
