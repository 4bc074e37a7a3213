"""Capturing signals from a forward pass: hooks on the modules that some objective asks for, and on no others."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from types import SimpleNamespace, TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kdcli.models.attention import configs_of, noting
from kdcli.models.blocks import BlockMatrix, block_matrix, block_of, body_of, by_row, hidden_module, hook_embeddings
from kdcli.models.families import family_of
from kdcli.models.inputs import mask_of, model_inputs
from kdcli.models.output_head import OutputHead, output_head
from kdcli.models.overparam import linears_of
from kdcli.models.placement import is_gathered
from kdcli.models.projections import projections_of
from kdcli.models.shape import attention_of
from kdcli.signals import MatrixKey, Prediction, Request, Signals
from kdcli.tensors.parametrization import chain_of, tensors_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdcli.tasks.kind import TaskKind


class _Complete(Exception):
    """Ends a forward pass whose rest is not asked for."""


def _output(inputs: Any, output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _as_taken(x: Tensor) -> Tensor:
    """Return a teacher's vector, which may be in half precision, as a student's matrix takes it."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(torch.promote_types(x.dtype, torch.float32))


def _share(matrix: BlockMatrix, inputs: Any, output: Any) -> Tensor:
    return matrix.of(output)


def _input_and_share(matrix: BlockMatrix, inputs: Any, output: Any) -> tuple[Tensor, Tensor]:
    return inputs[0], matrix.of(output)


class Capture:
    """Runs a model and gives what is asked for of it as `Signals`, and nothing more.

    Tensors are kept as they are: no copy, no detach. Where no predictions are wanted the head does not run, and the
    pass ends as soon as the last wanted module has run; where nothing of it is wanted there is no pass. A head that
    predicts tokens runs at the wanted positions alone.
    Hooks stay installed until `close()`, and do nothing outside a run.
    """

    def __init__(self, model: "PreTrainedModel", request: Request, kind: "TaskKind") -> None:
        """kind: of the task, which reads predictions from the model's output."""
        self.model = model
        self.request = request
        self.kind = kind
        self.attention = attention_of(model.config)
        self.to_end = is_gathered(model)
        """True where a pass must not end before its last block, as in a sharded model."""
        self._active = False
        self._scale: float | None = None
        self._positions: Tensor | None = None
        self._may_stop = False
        self._hidden: dict[int, Tensor] = {}
        self._matrices: dict[MatrixKey, Tensor] = {}
        self._windows: dict[int, Tensor] = {}
        self._linear: dict[MatrixKey, tuple[Tensor, Tensor]] = {}
        self._wanted: tuple[dict[Any, Any], ...] = (self._hidden, self._matrices, self._linear)
        self._calls: Counter[nn.Module] = Counter()
        self._outputs: dict[nn.Module, dict[int, list[Any]]] = {}
        self._projections: dict[nn.Module, dict[int, list[Any]]] = {}
        self._hooks: list[Any] = []
        self._last: Tensor | None = None
        if request.gradients:
            self._hooks.append(hook_embeddings(model, self._make_leaf))
        layers = request.hidden | ({0} if request.gradients else frozenset())
        self._capture(layers)
        self._configs = configs_of(model) if self._projections else []
        self._expected = len(layers) + len(request.matrices) + len(request.linear)
        self._hooks.append(body_of(model).register_forward_hook(self._select_positions))
        # What is differentiated by the inputs are logits that are there.
        self._head = output_head(model) if request.logits and not request.gradients else None

    def _capture(self, layers: frozenset[int]) -> None:
        """Prepare what is kept of which module: hidden states of these layers, and the matrices."""
        model, family = self.model, family_of(self.model.config)

        def of_call(taps: dict[nn.Module, dict[int, list[Any]]], module: nn.Module, layer: int) -> list[Any]:
            # A block that is run L times is block l in its l-th call.
            return taps.setdefault(module, {}).setdefault(layer if family.repeated else 1, [])

        if 0 in layers:
            self._hooks.append(hook_embeddings(model, self._keep_embeddings))
        for layer in sorted(layers - {0}):
            of_call(self._outputs, hidden_module(model, layer), layer).append((self._hidden, layer, _output))
        for layer, name in sorted(self.request.matrices):
            if family.at_function and name in ("query", "key", "value"):
                module = block_of(model, layer).get_submodule(family.attention_module)
                of_call(self._projections, module, layer).append((layer, name))
            else:
                matrix = block_matrix(model, layer, name)
                of_call(self._outputs, matrix.module, layer).append(
                    (self._matrices, (layer, name), partial(_share, matrix))
                )
        for layer, name in sorted(self.request.linear):
            matrix = block_matrix(model, layer, name)
            both = partial(_input_and_share, matrix)
            of_call(self._outputs, matrix.module, layer).append((self._linear, (layer, name), both))
        self._hooks.append(body_of(model).register_forward_pre_hook(lambda module, inputs: self._calls.clear()))
        self._hooks += [module.register_forward_hook(self._keep_output) for module in self._outputs]

    def _keep_embeddings(self, output: Tensor) -> None:
        if self._active:
            self._hidden[0] = output
            self._end_when_complete()

    def _keep_output(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._active:
            self._calls[module] += 1
            for store, key, found in self._outputs[module].get(self._calls[module], ()):
                store[key] = found(inputs, output)
            self._end_when_complete()

    def _keep_projections(self, module: nn.Module, vectors: dict[str, Tensor], window: Tensor | None) -> None:
        self._calls[module] += 1
        for layer, name in self._projections[module].get(self._calls[module], ()):
            self._matrices[(layer, name)] = vectors[name].transpose(1, 2).flatten(2)
            if window is not None:
                self._windows[layer] = window
        self._end_when_complete()

    def _end_when_complete(self) -> None:
        if self._may_stop and sum(map(len, self._wanted)) == self._expected:
            raise _Complete

    def _make_leaf(self, output: Tensor) -> Tensor | None:
        if not self._active:
            return None
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        return output if self._scale is None else output * self._scale

    def _select_positions(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if not self._active or self._positions is None:
            return None
        states = output[0]
        output.last_hidden_state = states.reshape(-1, states.shape[-1])[self._positions][None]
        return output

    def __enter__(self) -> "Capture":
        self._active = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._active = False
        self._positions = self._last = None
        for found in (*self._wanted, self._windows):
            found.clear()

    def run(self, batch: Mapping[str, Tensor], other: Signals | None = None) -> Signals:
        """Run the model on `batch` and return its signals; call it inside the `with` block.

        other: signals of the model whose matrices have the inputs that `request.local` names.
        """
        inputs = model_inputs(self.model, batch)
        logits = self.request.logits or self.request.gradients > 0
        self._positions = self.kind.positions(batch, everywhere=self.request.all_positions) if logits else None
        self._may_stop = not (logits or self.to_end)
        self._last = None
        with self._kernels():
            output = self._forward(inputs, batch, logits)
            path = list(self._path(inputs, batch, output)) if self.request.path > 1 and output is not None else []
        mask = batch.get("attention_mask")
        matrices = {key: by_row(x, mask) for key, x in self._matrices.items()}
        linear = {key: (by_row(x, mask), by_row(y, mask)) for key, (x, y) in self._linear.items()}
        local = self._on_inputs_of(other) if other is not None else {}
        captured = (*self._hidden.values(), *matrices.values(), *(x for x, _ in linear.values()), *local.values())
        return Signals(
            mask=mask_of(batch, next(iter(captured), None)),
            **self.attention,
            segments=batch.get("segments"),
            weights=batch.get("example_weights"),
            predictions=output or [],
            hidden=dict(self._hidden),
            matrices=matrices,
            windows=dict(self._windows),
            linear=linear,
            local=local,
            factors=self.factors(),
            projections=projections_of(self.model, sorted(self.request.projections)),
            path=path,
            last=self._last,
        )

    def _on_inputs_of(self, other: Signals) -> dict[MatrixKey, Tensor]:
        # What is computed beside the pass is none of its signals.
        self._active = False
        try:
            return {
                key: block_matrix(self.model, *key).on(_as_taken(other.linear[source][0]))
                for key, source in sorted(self.request.local)
            }
        finally:
            self._active = True

    def _forward(self, inputs: dict[str, Tensor], batch: Mapping[str, Tensor], logits: bool) -> list[Prediction] | None:
        if not logits and not self._expected:
            return None
        if not logits:
            with contextlib.suppress(_Complete):
                self._last = body_of(self.model)(**inputs)[0]
            return None
        output = self.model(**inputs) if self._head is None else self._run_in_parts(inputs, self._head)
        return self.kind.predictions(output, batch, everywhere=self.request.all_positions)

    def _run_in_parts(self, inputs: dict[str, Tensor], head: OutputHead) -> SimpleNamespace:
        """Return a decoder's output, with what its logits are formed from in their place."""
        states = body_of(self.model)(**inputs)[0]
        return SimpleNamespace(logits=head.logits(states.flatten(0, 1)))

    def _path(
        self, inputs: dict[str, Tensor], batch: Mapping[str, Tensor], plain: list[Prediction]
    ) -> Iterator[tuple[Tensor, list[Prediction]]]:
        """Yield scaled embeddings and their predictions; the last point is the plain pass, which gave `plain`."""
        kept = [dict(found) for found in self._wanted]
        steps = self.request.path
        for number in range(1, steps):
            self._scale = number / steps
            predictions = self._forward(inputs, batch, True)
            assert predictions is not None
            yield self._hidden[0], predictions
        self._scale = None
        for found, values in zip(self._wanted, kept, strict=True):
            found.update(values)
        yield self._hidden[0], plain

    @contextlib.contextmanager
    def _kernels(self) -> Iterator[None]:
        # Fused attention cannot be differentiated twice.
        twice = sdpa_kernel(SDPBackend.MATH) if self.request.gradients > 1 else contextlib.nullcontext()
        with twice, noting(self._configs, dict.fromkeys(self._projections, self._keep_projections)):
            yield

    def factors(self) -> dict[MatrixKey, tuple[Tensor, ...]]:
        """Return the live tensors of every chain, where these are asked for."""
        if not self.request.factors:
            return {}
        return {key: tensors_of(linear) for key, linear in linears_of(self.model) if chain_of(linear) is not None}

    def close(self) -> None:
        """Remove all hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
