"""What a fixed teacher computes inside for fixed inputs, computed once and kept on disk (`teacher.cache = "all"`)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import xxhash
from datasets import Dataset
from rich.console import Console
from torch import Tensor

from kdcli.data.rows import array_of
from kdcli.files import atomic_folder, fingerprint, write_json
from kdcli.models.blocks import block_matrix
from kdcli.models.capture import Capture
from kdcli.models.finite import NotFiniteError
from kdcli.models.hashing import hash_of_dataset, hash_of_model
from kdcli.models.shape import shape_of
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
"""A column of the training rows: where in the table the states of a row's first token are."""

STATES = "teacher_states"
"""The states of a batch, (batch, seq, width), 0 at padding."""

_DTYPES = {"fp32": (torch.float32, np.float32), "bf16": (torch.bfloat16, np.int16)}


@dataclass(frozen=True)
class Layout:
    """The columns of a table of states, which has a row a token. widths: of each state, in the table's order."""

    widths: dict[Key, int]
    dtype: Literal["fp32", "bf16"] = "fp32"

    @property
    def token_bytes(self) -> int:
        """The bytes of one token's states."""
        return sum(self.widths.values()) * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype][0]

    @property
    def columns(self) -> dict[Key, slice]:
        """The columns of each state."""
        ends = np.cumsum(list(self.widths.values())).tolist()
        return {key: slice(end - width, end) for (key, width), end in zip(self.widths.items(), ends, strict=True)}


def layout_of(teacher: "PreTrainedModel", request: Request, dtype: Literal["fp32", "bf16"]) -> Layout:
    """Return the table that holds what is asked for of the inside of a teacher; of its shapes alone."""
    widths: dict[Key, int] = {
        (layer, name): block_matrix(teacher, layer, name).weight.shape[0] for layer, name in sorted(request.matrices)
    }
    widths |= dict.fromkeys(sorted(request.hidden), shape_of(teacher.config).hidden)
    return Layout(widths, dtype)


@dataclass
class KeptStates:
    """The table of a teacher's states on disk: of every training row its real tokens, one after the other.

    starts: (rows,), the place of each training row's first token, in the order of the rows. heads: of the teacher.
    bands: of each block with a window how many keys a query attends to before and after itself.
    """

    path: Path
    layout: Layout
    starts: np.ndarray
    heads: int
    bands: dict[int, tuple[int, int]]

    @cached_property
    def table(self) -> np.ndarray:
        """The table, (tokens, width), mapped into memory: what is not read stays on the disk."""
        dtype = _DTYPES[self.layout.dtype][1]
        return np.memmap(self.path, dtype, "r").reshape(-1, sum(self.layout.widths.values()))

    def __getstate__(self) -> dict[str, Any]:
        # Another process maps the file itself.
        return {key: value for key, value in self.__dict__.items() if key != "table"}

    def placed(self, rows: Dataset) -> Dataset:
        """Return the training rows with their places in the table, which a `StatesCollator` reads."""
        return rows.add_column(PLACE, self.starts)  # type: ignore[call-arg]


@dataclass
class StageStates:
    """What the terms of one stage ask for of the kept states."""

    kept: KeptStates
    request: Request
    columns: dict[Key, slice] = field(init=False)
    """Of each state its columns in a batch."""
    runs: list[tuple[slice, slice]] = field(init=False)
    """(columns of the table, columns of a batch): neighbours are read in one piece."""

    def __post_init__(self) -> None:
        wanted = self.request.hidden | self.request.matrices
        layout = Layout({key: width for key, width in self.kept.layout.widths.items() if key in wanted})
        self.columns, self.runs = layout.columns, []
        for key, target in self.columns.items():
            source = self.kept.layout.columns[key]
            if self.runs and self.runs[-1][0].stop == source.start:
                before, there = self.runs.pop()
                source, target = slice(before.start, source.stop), slice(there.start, target.stop)
            self.runs.append((source, target))

    def read(self, places: Sequence[int], lengths: Sequence[int], seq: int) -> Tensor:
        """Return the states of rows, (rows, seq, width); 0 behind each one's last token."""
        table = self.kept.table
        found = np.empty((len(places), seq, self.runs[-1][1].stop), table.dtype)
        for number, (place, length) in enumerate(zip(places, lengths, strict=True)):
            for source, target in self.runs:
                found[number, :length, target] = table[place : place + length, source]
            found[number, length:] = 0
        states = torch.from_numpy(found)
        return states.view(torch.bfloat16) if self.kept.layout.dtype == "bf16" else states

    def signals(self, batch: Mapping[str, Tensor]) -> Signals:
        """Return the teacher's signals on a batch of a `StatesCollator`, as its own pass would give them."""
        states, mask = batch[STATES], batch["attention_mask"]
        parts = {key: states[..., columns] for key, columns in self.columns.items()}
        return Signals(
            mask=mask,
            heads=self.kept.heads,
            segments=batch.get("segments"),
            hidden={key: part for key, part in parts.items() if isinstance(key, int)},
            matrices={key: part for key, part in parts.items() if not isinstance(key, int)},
            windows={layer: _window(mask, *band) for layer, band in self.kept.bands.items()},
        )


@dataclass
class StatesCollator:
    """Adds the teacher's states to batches of training rows; others (`placed` or not) stay what they are."""

    collator: Any
    states: StageStates

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.collator(rows)
        if PLACE in rows[0]:
            places, lengths = ([row[name] for row in rows] for name in (PLACE, "length"))
            batch[STATES] = self.states.read(places, lengths, batch["attention_mask"].shape[1])
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
    lengths, order = array_of(rows, "length"), by_length(rows)
    starts = np.zeros(len(rows), np.int64)
    starts[order] = lengths[order].cumsum() - lengths[order]
    of = {
        "model": hash_of_model(teacher),
        "inputs": hash_of_dataset(rows),
        "states": [[*key, width] if isinstance(key, tuple) else [key, width] for key, width in layout.widths.items()],
        "dtype": layout.dtype,
        "format": 1,
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
    heads = shape_of(teacher.config).heads
    return KeptStates(folder / TABLE, layout, starts, heads, {int(key): tuple(band) for key, band in bands.items()})


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
        if _digest(folder / TABLE) != record["xxh3"]:
            return f"{TABLE} was changed after it was written (its hash differs)"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{RECORD} is damaged"
    return None


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while part := file.read(2**24):
            digest.update(part)
    return digest.hexdigest()


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
    """Write the table in the order of the pass, longest rows first; return what is known of it only now."""
    lengths, digest = array_of(rows, "length"), xxhash.xxh3_128()
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
                real = _real(lengths[numbers], batch["attention_mask"])
                table = _table(signals, layout)[real].to(layout.torch_dtype)
                if not table.isfinite().all():
                    raise NotFiniteError(
                        "the hidden states or matrix outputs of the teacher contain NaN or inf",
                        hint="its weights are damaged, or too large for the precision that it runs in",
                    )
                content = table.cpu().contiguous().view(torch.uint8).numpy().data
                digest.update(content)
                file.write(content)  # type: ignore[arg-type]
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


def _table(signals: Signals, layout: Layout) -> Tensor:
    """Return the states side by side, (batch, seq, width)."""
    states = [signals.hidden[key] if isinstance(key, int) else signals.matrices[key] for key in layout.widths]
    if (widths := [state.shape[-1] for state in states]) != list(layout.widths.values()):
        raise ValueError(f"the teacher's states are {widths} wide, not {list(layout.widths.values())}")
    return torch.cat([state.float() for state in states], -1)


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
