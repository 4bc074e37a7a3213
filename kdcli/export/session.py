"""An exported model that is called like a PyTorch one."""

import contextlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from kdcli.errors import InputError, RunError
from kdcli.machine import default_threads
from kdcli.models.written import as_read

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MODEL = "model.onnx"


class OnnxModel:
    """An ONNX folder in an ONNX Runtime session on the CPU, called like a model; it gives the head's outputs."""

    def __init__(self, folder: Path, *, threads: int | None = None, session: Any = None) -> None:
        """threads: of the session's operators; None takes `default_threads`. session: one that is open already.

        Raises InputError when the folder holds no graph that can be run.
        """
        self.session = session or _session(folder / MODEL, threads)
        self.folder = folder
        self.inputs = [node.name for node in self.session.get_inputs()]
        self.outputs = [node.name for node in self.session.get_outputs()]

    @cached_property
    def config(self) -> "PretrainedConfig":
        """The configuration beside the graph."""
        from transformers import AutoConfig

        path = self.folder / "config.json"
        try:
            raw = as_read(json.loads(path.read_text(encoding="utf-8")), str(path))
            family = raw.pop("model_type")
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise InputError(
                f"{path}, which names the classes of {MODEL}, is missing or broken", hint="export the model again"
            ) from error
        return AutoConfig.for_model(family, **raw)

    @property
    def megabytes(self) -> float:
        """Size of the graph and its weights on disk, in 10^6 bytes."""
        return sum(f.stat().st_size for f in self.folder.glob(f"{MODEL}*")) / 1e6

    def __call__(self, **inputs: torch.Tensor) -> SimpleNamespace:
        feed = {name: inputs[name].numpy() for name in self.inputs if name in inputs}
        for name in self.inputs:
            if name not in feed:
                feed[name] = torch.zeros_like(inputs["input_ids"]).numpy()
        with self.running():
            found = self.session.run(self.outputs, feed)
        named = zip(self.outputs, found, strict=True)
        return SimpleNamespace(**{name: torch.from_numpy(values) for name, values in named})

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Raise what ONNX Runtime raises, of many types of its own, as RunError."""
        try:
            yield
        except Exception as error:
            raise RunError(f"ONNX Runtime cannot run {self.folder / MODEL}: {str(error).splitlines()[0]}") from error


def _session(path: Path, threads: int | None) -> Any:
    import onnxruntime

    if not path.is_file():
        raise InputError(f"{path.parent} has no {path.name}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Threads that spin after a run would steal time from whatever runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # ONNX Runtime itself knows neither OMP_NUM_THREADS nor a container's share.
    options.intra_op_num_threads = threads or default_threads()
    options.inter_op_num_threads = 1
    # Where PyTorch's latency is measured, too; and a GPU's TF32 would be no check of the graph's numbers.
    providers = ["CPUExecutionProvider"]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:
        raise InputError(f"{path} cannot be run: {str(error).splitlines()[0]}") from error


def is_onnx_folder(path: Path) -> bool:
    """True when a folder holds an exported graph."""
    return (path / MODEL).is_file()
