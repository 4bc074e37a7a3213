"""How long a forward pass, or a token that is written, takes in PyTorch eager and in ONNX Runtime, in turn."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kdcli.errors import InputError
from kdcli.export.decoder_graph import TorchText
from kdcli.export.session import OnnxModel
from kdcli.models.families import family_of
from kdcli.models.inputs import model_inputs
from kdcli.models.shape import both_sides, check_lengths, longest_input, shape_of, takes_any_size
from kdcli.words import counted

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WARM_UP = 5

REST = 0.005
"""Seconds between two contestants."""

RUNS = 30
"""Timed calls of each contestant in a cell of the grid, where time allows."""

LIMIT = 60.0
"""Seconds for a whole grid, where the number of runs is not given."""

LENGTHS = (16, 128)
"""Tokens of timed texts, where none are asked for."""

WIDE = 1.5
"""How much longer than the fastest call three quarters of the calls may take."""

FEW = 5
"""Fewer calls than these show no spread."""

WRITTEN = 16
"""Tokens that are timed one by one after each prompt."""

PASS, FIRST, NEXT = "pass", "first token", "next token"
"""What is timed: a forward pass; a prompt, up to the logits of the first new token; one more token with the cache."""

SEQUENCE, IMAGE = "sequence", "image"
"""What the size of an example is called: tokens of a text, and the side of an image (or height and width) in pixels."""

Timed = dict[str, list[float]]
"""Milliseconds by what was timed; the longest part comes first."""


@dataclass(frozen=True)
class Contestant:
    """One model in one backend. wake: wakes its threads; run: what is timed."""

    model: str
    backend: str
    wake: Callable[[], Any]
    run: Callable[[], Timed]


Contest = Callable[[Mapping[str, tuple[Any, Any]], Tensor], list[Contestant]]
"""From models, as `measure` takes them, and ids (batch, seq) or pixels (batch, channels, height, width) to what is
timed of one cell of the grid."""

Size = int | tuple[int, int]
"""Tokens of a text; the side of an image, or its height and width, in pixels."""


def is_steady(times: Sequence[float]) -> bool:
    """True when repeated times of one thing are close enough to say how long it takes.

    That is when three quarters of them are within 1.5 times the fastest, and there are 5 at least. Other programs and
    the scheduler only ever add to a time: the fastest call is the one that they disturbed least, and a median far
    above it measures them. The upper quartile, unlike p95, lets a few hiccups pass.
    """
    return len(times) >= FEW and float(np.percentile(times, 75)) <= WIDE * min(times)


@dataclass
class LatencyReport:
    """rows: model, backend, batch, sequence or (of images) image, what (`PASS`, or `FIRST` and `NEXT`), runs, fastest,
    p50, p75, p95, p99 (milliseconds), throughput (examples a second; of next tokens, tokens), steady: whether the times
    are close enough together to rely on (`is_steady`)."""

    rows: list[dict[str, Any]]
    threads: int
    of_images: bool = False

    @property
    def axis(self) -> str:
        """What rows call the size of an example."""
        return IMAGE if self.of_images else SEQUENCE

    def to_json(self) -> dict[str, Any]:
        runs = max((row["runs"] for row in self.rows), default=0)
        return {"threads": self.threads, "runs": runs, "rows": self.rows}

    def doubt(self) -> str | None:
        """Return which times not to rely on, and what to do; None when all are steady."""
        unsteady = [row for row in self.rows if not row["steady"]]
        if not unsteady:
            return None
        row = max(unsteady, key=lambda row: row["p75"] / row["fastest"])
        worst = f"{row['model']} {row['batch']} x {row[self.axis]} in {row['backend']}"
        if row["what"] != PASS:
            worst = f"the {row['what']} of {worst}"
        if row["runs"] < FEW:
            seen = f"{worst} had {counted(row['runs'], 'run')}"
        else:
            seen = f"{worst} took from {row['fastest']:.2f} to {row['p99']:.2f} ms"
        return (
            f"{len(unsteady)} of {len(self.rows)} latencies are unsteady, marked *: {seen}. Measure again with more "
            "--runs, on a machine that does nothing else, or with fewer --threads"
        )

    def of(self, model: str, backend: str, batch: int, size: Size, what: str | None = None) -> dict[str, Any]:
        """Return one row. size: of an example. what: None takes the last, which of generated text is a next token."""
        asked = (model, backend, batch, size)
        return [
            row
            for row in self.rows
            if (row["model"], row["backend"], row["batch"], row[self.axis]) == asked and what in (None, row["what"])
        ][-1]


def passes(models: Mapping[str, tuple[Any, Any]], examples: Tensor) -> list[Contestant]:
    """Return forward passes of each model in PyTorch and, where it has a session, in ONNX Runtime."""
    full = {
        "input_ids": examples,
        "attention_mask": torch.ones_like(examples),
        "token_type_ids": torch.zeros_like(examples),
    }
    if examples.is_floating_point():
        full = {"pixel_values": examples}

    def contestant(name: str, backend: str, model: Any, inputs: dict[str, Tensor]) -> Contestant:
        return Contestant(name, backend, partial(model, **inputs), lambda: {PASS: [_milliseconds(model, **inputs)]})

    found = []
    for name, (model, exported) in models.items():
        inputs = model_inputs(model, full)
        found.append(contestant(name, "PyTorch", model, inputs))
        if exported is not None:
            found.append(contestant(name, "ONNX Runtime", exported, inputs))
    return found


def texts(models: Mapping[str, tuple[Any, Any]], ids: Tensor) -> list[Contestant]:
    """Return prompts and what follows them, token by token, of each model in PyTorch and in ONNX Runtime."""
    prompts, rows, length = ids.numpy(), *ids.shape

    def write(start: Callable[..., Any], tokens: int) -> Timed:
        """Time the first token and the next ones; the most probable ones, as far as the model has positions."""
        text = start(rows, length + tokens)
        times = []
        new = prompts
        for _ in range(tokens):
            begun = time.perf_counter()
            new = text.read(new, np.ones_like(new))[:, -1].argmax(-1)[:, None]
            times.append(1000 * (time.perf_counter() - begun))
        return {FIRST: times[:1], NEXT: times[1:]}

    def contestant(name: str, backend: str, start: Callable[..., Any], positions: int | None) -> Contestant:
        tokens = 1 + WRITTEN if positions is None else min(1 + WRITTEN, 1 + positions - length)

        def wake() -> None:
            one = prompts[:1, :1]
            start(1, 1).read(one, np.ones_like(one))

        return Contestant(name, backend, wake, partial(write, start, tokens))

    found = []
    for name, (model, exported) in models.items():
        positions = longest_input(model.config)
        found.append(contestant(name, "PyTorch", partial(TorchText, model), positions))
        if exported is not None:
            found.append(contestant(name, "ONNX Runtime", exported.text, positions))
    return found


def _milliseconds(call: Callable[..., Any], **arguments: Any) -> float:
    started = time.perf_counter()
    call(**arguments)
    return 1000 * (time.perf_counter() - started)


def check_grid(
    configs: Mapping[str, "PretrainedConfig"],
    lengths: Sequence[int] | None,
    image_sizes: Sequence[int] | None,
    names: tuple[str, str],
) -> None:
    """Raise InputError when some model cannot read texts of these lengths, or images of these sizes.

    configs: by the models' names, the one that is exported among them; all read texts, or all images. lengths,
    image_sizes: tokens, and sides in pixels; None where none are asked for. names: of both in messages.
    """
    of_lengths, of_sizes = names
    if any(family_of(config).reads == "text" for config in configs.values()):
        if image_sizes is not None:
            raise InputError("the model reads texts, not images", where=of_sizes)
        check_lengths(configs, LENGTHS if lengths is None else lengths, of_lengths)
        return
    if lengths is not None:
        raise InputError("the model reads images, which have no tokens of text", where=of_lengths)
    shapes = {name: shape_of(config) for name, config in configs.items()}
    usual = next(iter(shapes.values())).image
    for name, shape in shapes.items():
        for size in [usual] if image_sizes is None else image_sizes:
            if size is None or shape.image is None or both_sides(size) == both_sides(shape.image):
                continue
            own = " x ".join(map(str, both_sides(shape.image)))
            if not takes_any_size(configs[name]):
                raise InputError(f"the {name} reads images of {own} pixels alone, not of {size}", where=of_sizes)
            if shape.patch is not None and min(both_sides(size)) < max(both_sides(shape.patch)):
                raise InputError(f"{size} pixels are less than a patch of the {name}", where=of_sizes)


@torch.inference_mode()
def measure(
    models: Mapping[str, tuple[Any, OnnxModel | None]],
    *,
    batch_sizes: Sequence[int],
    sequence_lengths: Sequence[int] = (),
    image_sizes: Sequence[Size] = (),
    threads: int,
    runs: int | None = None,
    vocab_size: int = 1000,
    channels: int = 3,
    limit: float = LIMIT,
    contest: Contest = passes,
) -> LatencyReport:
    """Time every model over a grid of batch sizes and sequence lengths or, of images, image sizes.

    models: name -> (PyTorch model, its ONNX session or None). All contestants of a grid cell run once a round,
    in turn, so that a drift of the machine's speed meets all of them; the first rounds are not counted, and in every
    round each rests and runs once uncounted before it is timed.
    runs: timed calls of each; None takes 30, or as many as the first calls show to fit into `limit` seconds for the
    whole grid, and one at least.
    contest: what is timed, `passes` or `texts`; of the latter, 16 tokens a run after the first.
    PyTorch's thread count is set for the time and restored. Sessions keep the count they were opened with.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    sizes: Sequence[Size] = image_sizes or sequence_lengths
    cells = [(batch, size) for batch in batch_sizes for size in sizes]
    report = LatencyReport(rows, threads, of_images=bool(image_sizes))
    end = time.perf_counter() + limit
    try:
        for number, (batch, size) in enumerate(cells):
            # What a cell leaves over is for those after it.
            share = None if runs is not None else (end - time.perf_counter()) / (len(cells) - number)
            generator = torch.Generator().manual_seed(0)
            if image_sizes:
                examples = torch.randn(batch, channels, *both_sides(size), generator=generator)
            else:
                assert isinstance(size, int)
                examples = torch.randint(5, vocab_size, (batch, size), generator=generator)
            cell = {"batch": batch, report.axis: size}
            rows += _cell(contest(models, examples), cell, runs or RUNS, share)
    finally:
        torch.set_num_threads(before)
    return report


def _cell(
    contestants: Sequence[Contestant], cell: dict[str, Any], runs: int, seconds: float | None
) -> list[dict[str, Any]]:
    """Return the rows of one cell. cell: its place in the grid.

    seconds: for all of it; None for as long as `runs` calls take.
    """
    begun = time.perf_counter()

    def one_round() -> list[Timed]:
        """Time every contestant once."""
        found = []
        for one in contestants:
            # The last contestant's threads still wait for work at full speed: give them time to go to sleep,
            # and this one's a call to wake up.
            time.sleep(REST)
            one.wake()
            found.append(one.run())
        return found

    first = one_round()
    warm_up = WARM_UP - 1
    if seconds is not None:
        # Waking takes one more pass, and less than that before a text.
        calls = {PASS: 2, FIRST: 1, NEXT: 1}
        cost = sum(REST + sum(calls[what] * sum(times) for what, times in timed.items()) / 1000 for timed in first)
        affordable = int(max(0.0, begun + seconds - time.perf_counter()) / cost)
        warm_up = min(warm_up, affordable // 4)
        runs = max(1, min(runs, affordable - warm_up))
    for _ in range(warm_up):
        one_round()
    rounds: list[list[Timed]] = []
    # The machine may have become slower since the first round.
    while len(rounds) < runs and not (rounds and seconds is not None and time.perf_counter() > begun + seconds):
        rounds.append(one_round())
    rows = []
    for number, one in enumerate(contestants):
        for what in rounds[0][number]:
            values = [value for timed in rounds for value in timed[number][what]]
            if not values:
                continue
            p50, p75, p95, p99 = np.percentile(values, [50, 75, 95, 99])
            rows.append(
                {
                    "model": one.model,
                    "backend": one.backend,
                    **cell,
                    "what": what,
                    "runs": len(rounds),
                    "steady": is_steady(values),
                    "fastest": min(values),
                    "p50": float(p50),
                    "p75": float(p75),
                    "p95": float(p95),
                    "p99": float(p99),
                    "throughput": 1000 * cell["batch"] / float(np.mean(values)),
                }
            )
    return rows
