"""What a fixed teacher computes inside for fixed inputs, computed once and kept on disk (`teacher.cache = "all"`)."""

import json
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import xxhash
from datasets import Dataset
from rich.console import Console
from torch import Tensor

from kdcli.data.rows import array_of
from kdcli.files import atomic_folder, fingerprint, quick_hash_of_file, write_json
from kdcli.models.blocks import block_matrix
from kdcli.models.capture import Capture
from kdcli.models.finite import NotFiniteError
from kdcli.models.hashing import hash_of_dataset, hash_of_model
from kdcli.models.inputs import main_input
from kdcli.models.shape import attention_of, shape_of, token_counts
from kdcli.signals import MatrixKey, Request, Signals
from kdcli.tasks.predict import by_length, in_order, placed
from kdcli.terminal import tell
from kdcli.training.distributed import agree, main_does
from kdcli.training.teacher_cache import keep_predictions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdcli.tasks.kind import TaskKind

Key = int | MatrixKey
"""Of a hidden state its layer, of a matrix output its block and name."""

TABLE, RECORD = "states.bin", "record.json"

PLACE = "teacher_states_at"
"""Of a training row where its states begin, counted in tokens; of a batch that and the length of each row."""

_DTYPES = {"fp32": (torch.float32, np.float32), "bf16": (torch.bfloat16, np.int16)}


@dataclass(frozen=True)
class Layout:
    """What is kept of each row: one state after the other, each of them a token after the other.

    widths: of each state, in their order.
    """

    widths: dict[Key, int]
    dtype: Literal["fp32", "bf16"] = "fp32"

    @property
    def token_bytes(self) -> int:
        """The bytes of one token's states."""
        return sum(self.widths.values()) * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype][0]

    @cached_property
    def columns(self) -> dict[Key, int]:
        """The sum of the widths before each state's."""
        ends = np.cumsum(list(self.widths.values())).tolist()
        return {key: end - width for (key, width), end in zip(self.widths.items(), ends, strict=True)}


def layout_of(teacher: "PreTrainedModel", request: Request, dtype: Literal["fp32", "bf16"]) -> Layout:
    """Return what is kept where this is asked for of the inside of a teacher; of its shapes alone."""
    widths: dict[Key, int] = {
        (layer, name): block_matrix(teacher, layer, name).weight.shape[0] for layer, name in sorted(request.matrices)
    }
    widths |= dict.fromkeys(sorted(request.hidden), shape_of(teacher.config).hidden)
    return Layout(widths, dtype)


@dataclass
class KeptStates:
    """A teacher's states on disk: of every training row its real tokens.

    image: how many tokens each row is, where rows are images; None where a row's length says it. starts: (rows,), the
    tokens before each training row's, in the order of the rows. attention: what signals say of the teacher's.
    bands: of each block with a window how many keys a query attends to before and after itself.
    """

    path: Path
    layout: Layout
    starts: np.ndarray
    attention: dict[str, Any]
    bands: dict[int, tuple[int, int]]
    image: int | None = None

    @cached_property
    def numbers(self) -> np.memmap:
        """All of them, flat, mapped into memory: what is not read stays on the disk."""
        return np.memmap(self.path, _DTYPES[self.layout.dtype][1], "r")

    @cached_property
    def width(self) -> int:
        """The numbers of one token."""
        return sum(self.layout.widths.values())

    def __getstate__(self) -> dict[str, Any]:
        # Another process maps the file itself.
        return {key: value for key, value in self.__dict__.items() if key != "numbers"}

    def placed(self, rows: Dataset) -> Dataset:
        """Return the training rows with the places of their states, which a `StatesCollator` reads."""
        return rows.add_column(PLACE, self.starts)  # type: ignore[call-arg]

    def expect(self, places: list[tuple[int, int]]) -> None:
        """Let the operating system read the states of rows from the disk meanwhile, as far as it can do so."""
        if hasattr(mmap, "MADV_WILLNEED"):
            file, item = self.numbers._mmap, self.numbers.itemsize  # type: ignore[attr-defined]
            for place, length in places:
                first = place * self.width * item // mmap.PAGESIZE * mmap.PAGESIZE
                file.madvise(mmap.MADV_WILLNEED, first, (place + length) * self.width * item - first)

    def read(self, key: Key, batch: Mapping[str, Any]) -> Tensor:
        """Return one state of a batch of a `StatesCollator`, (batch, seq, width), on its device; 0 at padding."""
        mask, numbers, width = self.mask(batch), self.numbers, self.layout.widths[key]
        # From pinned memory the copy to a GPU does not hold up the host.
        found = torch.empty(*mask.shape, width, dtype=self.layout.torch_dtype, pin_memory=mask.is_cuda)
        target = (found.view(torch.int16) if self.layout.dtype == "bf16" else found).numpy()
        for row, (place, length) in enumerate(batch[PLACE]):
            first = place * self.width + length * self.layout.columns[key]
            target[row, :length].reshape(-1)[:] = numbers[first : first + length * width]
            target[row, length:] = 0
        return found.to(mask.device, non_blocking=True)

    def mask(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the real tokens of a batch as ones, (batch, seq)."""
        if self.image is None:
            return batch["attention_mask"]  # type: ignore[no-any-return]
        read = main_input(batch)
        return torch.ones(len(read), self.image, dtype=torch.long, device=read.device)

    def signals(self, batch: Mapping[str, Any]) -> Signals:
        """Return the teacher's signals on a batch of a `StatesCollator`, as its own pass would give them.

        A state is read when it is asked for, and not held: beside the student no memory is needed for all of them.
        """
        mask, keys = self.mask(batch), self.layout.widths
        read = partial(self.read, batch=batch)
        return Signals(
            mask=mask,
            **self.attention,
            segments=batch.get("segments"),
            hidden=_Lazily([key for key in keys if isinstance(key, int)], read),
            matrices=_Lazily([key for key in keys if not isinstance(key, int)], read),
            windows={layer: _window(mask, *band) for layer, band in self.bands.items()},
        )


class _Lazily(Mapping[Any, Tensor]):
    """Tensors by key that are read when they are asked for."""

    def __init__(self, keys: list[Any], read: Callable[[Any], Tensor]) -> None:
        self.keys_, self.read = keys, read

    def __getitem__(self, key: Any) -> Tensor:
        return self.read(key)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys_)

    def __len__(self) -> int:
        return len(self.keys_)


@dataclass
class StatesCollator:
    """Tells in batches of training rows where the teacher's states are; other batches stay what they are."""

    collator: Any
    kept: KeptStates

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(rows)
        if PLACE in rows[0]:
            batch[PLACE] = [(row[PLACE], self.kept.image or row["length"]) for row in rows]
            self.kept.expect(batch[PLACE])
        return batch

    def begin_epoch(self, epoch: int) -> None:
        """Tell the collator below which epoch begins, where it cares."""
        if hasattr(self.collator, "begin_epoch"):
            self.collator.begin_epoch(epoch)


def keep_states(
    teacher: "PreTrainedModel",
    rows: Dataset,
    collator: Any,
    *,
    kind: "TaskKind",
    request: Request,
    layout: Layout,
    folder: Path,
    batch_size: int,
    device: str,
    console: Console,
) -> KeptStates:
    """Return the states of a fixed teacher for encoded training rows, computed in one pass before the training.

    request: of all stages; where predictions are asked for, too, those of the same pass go into their own cache.
    folder: appears whole or not at all. What is there already is used when it was made from the same teacher, inputs
    and layout, and nothing of it was changed since; else it is made again, and the console told.
    Raises NotFiniteError when a state contains NaN or inf.
    """
    lengths, order = token_counts(teacher.config, array_of(rows, "length")), by_length(rows)
    starts = np.zeros(len(rows), np.int64)
    starts[order] = lengths[order].cumsum() - lengths[order]
    of = {
        "model": hash_of_model(teacher),
        "inputs": hash_of_dataset(rows),
        "states": [[*key, width] if isinstance(key, tuple) else [key, width] for key, width in layout.widths.items()],
        "dtype": layout.dtype,
        "format": 2,
    }
    size = int(lengths.sum()) * layout.token_bytes

    def make() -> None:
        problem = _problem_of(folder, of, size) if folder.exists() else None
        if problem is not None:
            tell(console, f"cache: {folder} is made again: {problem}")
        if problem is None and folder.exists():
            return
        tell(console, f"teacher: {size / 1e9:,.2f} GB of its states are computed once and kept in {folder}")
        with atomic_folder(folder, ours=True) as new:
            record = _write(new / TABLE, teacher, rows, collator, kind, request, layout, batch_size, device)
            write_json(new / RECORD, _sealed({"of": of, "bytes": size, **record}))

    main_does(make)
    bands = agree(json.loads((folder / RECORD).read_text(encoding="utf-8"))["bands"])
    attention = attention_of(teacher.config)
    by_block = {int(key): tuple(band) for key, band in bands.items()}
    return KeptStates(folder / TABLE, layout, starts, attention, by_block, shape_of(teacher.config).tokens)


def _sealed(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "fingerprint": fingerprint(content)}


def _problem_of(folder: Path, of: dict[str, Any], size: int) -> str | None:
    """Return why a folder cannot be used; None when it holds what was written, and that was made from `of`."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        seal = record.pop("fingerprint")
        if seal != fingerprint(record):
            return f"{RECORD} was changed after it was written"
        if record["of"] != of or record["bytes"] != size:
            return "it was made from something else"
        found = (folder / TABLE).stat().st_size
        if found != size:
            return f"{TABLE} has {found:,} bytes, not {size:,}"
        if quick_hash_of_file(folder / TABLE) != record["xxh3"]:
            return f"{TABLE} was changed after it was written (its hash differs)"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{RECORD} is damaged"
    return None


def _write(
    path: Path,
    teacher: "PreTrainedModel",
    rows: Dataset,
    collator: Any,
    kind: "TaskKind",
    request: Request,
    layout: Layout,
    batch_size: int,
    device: str,
) -> dict[str, Any]:
    """Write the states in the order of the pass, longest rows first; return what is known of it only now."""
    lengths, digest = token_counts(teacher.config, array_of(rows, "length")), xxhash.xxh3_128()
    capture = Capture(teacher, replace(request, factors=False), kind)
    outputs: list[Any] = []
    hook = teacher.register_forward_hook(lambda model, inputs, output: outputs.append(output))
    bands: dict[int, tuple[int, int]] = {}
    found: dict[str, list[np.ndarray]] = {name: [] for name in kind.head.outputs if request.logits}
    try:
        with placed(teacher, device) as place, torch.inference_mode(), path.open("wb") as file:
            order = by_length(rows)
            for start in range(0, len(order), batch_size):
                numbers = order[start : start + batch_size]
                batch = collator(rows.__getitems__(numbers.tolist()))
                batch = {name: values.to(place) for name, values in batch.items()}
                with capture as running:
                    signals = running.run(batch)
                real = _real(lengths[numbers], signals.mask)
                states = _arrays(signals, layout, real)
                for row, length in enumerate(lengths[numbers]):
                    for state in states:
                        content = state[row, :length].data
                        digest.update(content)
                        file.write(content)
                for layer, window in signals.windows.items():
                    bands[layer] = _wider(bands.get(layer, (0, 0)), window, real)
                for name, parts in found.items():
                    parts.append(torch.as_tensor(getattr(outputs[-1], name)).float().cpu().numpy())
                outputs.clear()
    finally:
        hook.remove()
        capture.close()
    if found:
        per_token = kind.head.per_token
        by_row = {
            name: in_order(parts, order, lengths if per_token else None, "the teacher") for name, parts in found.items()
        }
        keep_predictions(by_row, teacher, rows, per_token=per_token)
    return {"xxh3": digest.hexdigest(), "bands": {str(layer): list(band) for layer, band in sorted(bands.items())}}


def _real(lengths: np.ndarray, mask: Tensor) -> Tensor:
    """Return where a batch has tokens, (batch, seq), boolean."""
    return torch.arange(mask.shape[1], device=mask.device) < torch.from_numpy(lengths).to(mask.device)[:, None]


def _arrays(signals: Signals, layout: Layout, real: Tensor) -> list[np.ndarray]:
    """Return the states of a batch as they are kept, (batch, seq, width) each, all finite at real tokens."""
    states = [signals.hidden[key] if isinstance(key, int) else signals.matrices[key] for key in layout.widths]
    if (widths := [state.shape[-1] for state in states]) != list(layout.widths.values()):
        raise ValueError(f"the teacher's states are {widths} wide, not {list(layout.widths.values())}")
    kept = [state.to(layout.torch_dtype).contiguous() for state in states]
    if not torch.stack([state[real].isfinite().all() for state in kept]).all():
        raise NotFiniteError(
            "the hidden states or matrix outputs of the teacher contain NaN or inf",
            hint="its weights are damaged, or too large for the precision that it runs in",
        )
    return [(state.view(torch.int16) if layout.dtype == "bf16" else state).cpu().numpy() for state in kept]


def _wider(band: tuple[int, int], window: Tensor, real: Tensor) -> tuple[int, int]:
    """Return how far queries see before and after themselves, `band` among it. window: (batch or 1, 1, seq, seq)."""
    seen = window[:, 0] & real[:, :, None] & real[:, None, :]
    places = torch.arange(real.shape[1], device=real.device)
    reach = torch.where(seen, places[:, None] - places, 0)
    return max(band[0], int(reach.max())), max(band[1], int(-reach.min()))


def _window(mask: Tensor, before: int, after: int) -> Tensor:
    """Return the keys that each query attends to, (batch, 1, seq, seq)."""
    places = torch.arange(mask.shape[1], device=mask.device)
    distance = places[:, None] - places
    window = (distance <= before) & (distance >= -after)
    return window.expand(len(mask), 1, -1, -1)
