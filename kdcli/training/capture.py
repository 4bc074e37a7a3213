"""Capturing signals from a forward pass: hooks on the modules that some objective asks for, and on no others."""

from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from kdcli.models.anatomy import block_matrix, blocks_of, embeddings_of
from kdcli.models.shape import shape_of
from kdcli.objectives.base import MatrixKey, Signals, Wants
from kdcli.tensors.parametrize import chain_of, linears_of, tensors_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


class Capture:
    """Listens to a model while `with capture:` holds, and gives what it heard as `Signals`.

    Tensors are kept as they are: no copy, no detach, no change of the forward pass. Hooks stay installed
    until `close()`, and do nothing outside the block.
    """

    def __init__(self, model: "PreTrainedModel", wants: Wants) -> None:
        self.wants = wants
        self.heads = shape_of(model.config).heads
        self.chains: dict[MatrixKey, nn.Module] = {}
        if wants.factors:
            self.chains = {key: linear for key, linear in linears_of(model) if chain_of(linear) is not None}
        self._listening = False
        self._hidden: dict[int, Tensor] = {}
        self._matrices: dict[MatrixKey, Tensor] = {}
        self._hooks = []
        blocks = blocks_of(model)
        for layer in sorted(wants.hidden):
            module = embeddings_of(model) if layer == 0 else blocks[layer - 1]
            self._hooks.append(module.register_forward_hook(self._listener(self._hidden, layer)))
        for key in sorted(wants.matrices):
            self._hooks.append(block_matrix(model, *key).register_forward_hook(self._listener(self._matrices, key)))

    def _listener(self, store: dict[Any, Tensor], key: Any) -> Any:
        def listen(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._listening:
                store[key] = _tensor(output)

        return listen

    def __enter__(self) -> "Capture":
        self._listening = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listening = False
        self._hidden.clear()
        self._matrices.clear()

    def signals(self, mask: Tensor, logits: Tensor | None) -> Signals:
        """Return what the last forward pass said; call it inside the `with` block."""
        return Signals(
            mask=mask,
            heads=self.heads,
            logits=logits,
            hidden=dict(self._hidden),
            matrices=dict(self._matrices),
            factors={key: tensors_of(linear) for key, linear in self.chains.items()},
        )

    def close(self) -> None:
        """Remove all hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
