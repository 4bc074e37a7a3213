"""kdcli: make transformer models smaller by knowledge distillation, with the evidence."""

import importlib

from kdcli.models.plain_loaders import register
from kdcli.vision_operators import declare_on_import

__version__ = "0.1.0"
__all__ = ["__version__", "distill", "load_model"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    import kdcli.distill as distill
    from kdcli.tasks.heads import load_model


def __getattr__(name: str) -> object:
    # torch takes seconds to import: `kdcli --help` must not pay for it.
    if name == "load_model":
        from kdcli.tasks.heads import load_model

        return load_model
    if name == "distill":
        return importlib.import_module("kdcli.distill")
    raise AttributeError(f"module 'kdcli' has no attribute {name!r}")


def _heads() -> object:
    from kdcli.tasks.heads import heads

    return heads()


declare_on_import()
register(_heads)  # type: ignore[arg-type]
