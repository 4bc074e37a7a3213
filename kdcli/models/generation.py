"""Text that a causal model writes: batches of prompts padded on the left, greedy or sampled."""

import math
import time
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kdcli.models.finite import NotFiniteError
from kdcli.models.quiet import quiet_transformers
from kdcli.models.shape import longest_input
from kdcli.terminal import tell

if TYPE_CHECKING:
    from rich.console import Console

SECONDS = 10.0
"""Between two lines of progress."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the most probable one.

    Else it is drawn from the distribution at this temperature, of which `top_k` keeps as many of the most probable
    tokens (0: all), and `top_p` the fewest that have this share of the mass together.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


GREEDY = Sampling()


@dataclass(frozen=True)
class Mixture:
    """Another model over the same tokens, and the share of its distribution in the one that tokens are drawn from.

    (1 - share) q + share p, before temperature, top_k and top_p. Source: MiniLLM (arXiv 2306.08543), section 2.2.
    """

    model: Any
    share: float


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end: Collection[int],
    pad: int,
    sampling: Sampling = GREEDY,
    mixture: Mixture | None = None,
    seed: int | Sequence[int] = 0,
    numbers: Sequence[int] | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    owner: str = "the model",
    console: "Console | None" = None,
) -> list[list[int]]:
    """Return the tokens that a model writes after each prompt, up to the first token of `end`, which is among them.

    model: a PyTorch model, on whatever device it is; or anything with its `config`, `device` and `generate` (an
    exported graph with a cache). prompts: ids, none of them empty. max_length: of prompt and response together. What is
    written does not depend on the other prompts of a batch, but for rounding. What is drawn depends on `seed` and the
    prompt's number, and on nothing else: no random state of the process is read or changed. numbers: of the prompts;
    left out, their places. mixture: a PyTorch model in eval mode that takes part in each draw.
    owner: what an error calls the model. console: is told of progress, where it takes long.
    The model is in eval mode for the time. Raises NotFiniteError where logits contain NaN or inf, and ValueError for
    an empty prompt.
    """
    numbers = range(len(prompts)) if numbers is None else numbers
    limits = [_limit(len(prompt), max_new_tokens, max_length) for prompt in prompts]
    responses: list[list[int]] = [[] for _ in prompts]
    progress = Progress(console, len(prompts))
    config: Any = model.config
    with _ready(model) if isinstance(model, nn.Module) else nullcontext():
        for rows in _batches(prompts, limits, batch_size, longest_input(config)):
            draws = None
            if sampling.temperature > 0:
                draws = _draws([numbers[row] for row in rows], seed, max(limits[row] for row in rows))
            found = _generate(
                model,
                [prompts[row] for row in rows],
                max_new_tokens=max(limits[row] for row in rows),
                end=end,
                pad=pad,
                sampling=sampling,
                mixture=mixture,
                draws=draws,
                owner=owner,
            )
            for row, response in zip(rows, found, strict=True):
                responses[row] = response[: limits[row]]
            progress.add(len(rows), sum(len(responses[row]) for row in rows))
    return responses


def _limit(prompt: int, max_new_tokens: int, max_length: int | None) -> int:
    if not prompt:
        raise ValueError("a prompt has no token: nothing can be written after it")
    return max_new_tokens if max_length is None else max(0, min(max_new_tokens, max_length - prompt))


def _batches(
    prompts: Sequence[Sequence[int]], limits: list[int], batch_size: int, positions: int | None
) -> Iterator[list[int]]:
    """Yield which prompts run together, the longest first. positions: that the model has; None where it needs none.

    A batch runs as long as the longest of its limits. Where that is more than the model has positions for, prompts of
    one limit run together: one that is done goes on with padding, and would be given positions that are not there.
    """
    order = sorted((row for row in range(len(prompts)) if limits[row]), key=lambda row: -len(prompts[row]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        if positions is None or len(prompts[rows[0]]) + max(limits[row] for row in rows) <= positions:
            yield rows
        else:
            # Sorted by length, equal limits are neighbours.
            yield from (list(same) for _, same in groupby(rows, key=lambda row: limits[row]))


def _draws(numbers: Sequence[int], seed: int | Sequence[int], tokens: int) -> Tensor:
    """Return a uniform number for every token of every prompt, (prompts, tokens), float64."""
    seeds = [seed] if isinstance(seed, int) else list(seed)
    return torch.from_numpy(np.stack([np.random.default_rng([*seeds, number]).random(tokens) for number in numbers]))


@contextmanager
def _ready(model: nn.Module) -> Iterator[None]:
    """Keep a model in eval mode, with nothing that its own files say of generation; leave it as it was."""
    modes = {module: module.training for module in model.modules()}
    # A repetition penalty or suppressed tokens would be taken from there.
    own, model.generation_config = model.generation_config, GenerationConfig()  # type: ignore[assignment]
    try:
        model.eval()
        # Weights that are computed from others are computed once, not for every token.
        with quiet_transformers(), warnings.catch_warnings(), torch.no_grad(), parametrize.cached():
            warnings.simplefilter("ignore")
            yield
    finally:
        model.generation_config = own
        for module, training in modes.items():
            module.training = training


def _generate(
    model: Any,
    prompts: list[Sequence[int]],
    *,
    max_new_tokens: int,
    end: Collection[int],
    pad: int,
    sampling: Sampling,
    mixture: Mixture | None,
    draws: Tensor | None,
    owner: str,
) -> list[list[int]]:
    """Return what a model writes after the prompts of one batch."""
    place, width = model.device, max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    finite = _Finite()
    processors = LogitsProcessorList([finite])
    mask = mask.to(place)
    if mixture is not None:
        processors.append(_Mix(mixture, mask))
    if draws is not None:
        processors += [TemperatureLogitsWarper(sampling.temperature)] if sampling.temperature != 1.0 else []
        processors += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
        processors += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1.0 else []
        processors.append(_Draw(draws.to(place), width))
    output = model.generate(
        input_ids=ids.to(place),
        attention_mask=mask,
        # What is drawn is drawn by a processor, so that the most probable token is the one that was drawn.
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(end) or None,
            pad_token_id=pad,
            use_cache=True,
        ),
        logits_processor=processors,
    )
    if not finite.holds():
        raise NotFiniteError(
            f"the logits of {owner} contain NaN or inf while it generates",
            hint="its weights are damaged, or too large for the precision that it runs in",
        )
    return [_cut(row, end) for row in output[:, width:].tolist()]


def _cut(ids: list[int], end: Collection[int]) -> list[int]:
    return next((ids[: place + 1] for place, token in enumerate(ids) if token in end), ids)


class _Finite(LogitsProcessor):
    """Notes, on the device, whether any logits are none."""

    def __init__(self) -> None:
        self._seen: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wrong = scores.isnan().any() | (scores == torch.inf).any()
        self._seen = wrong if self._seen is None else self._seen | wrong
        return scores

    def holds(self) -> bool:
        return self._seen is None or not bool(self._seen)


class _Mix(LogitsProcessor):
    """Gives the logarithms of the mixed probabilities; the other model runs beside, with a cache of its own.

    mask: (rows, width) of the prompts, padded on the left.
    """

    def __init__(self, mixture: Mixture, mask: Tensor) -> None:
        self.mixture = mixture
        self.mask = mask
        self.cache: Any = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # Of all tokens before it has the keys and values.
        new = input_ids if self.cache is None else input_ids[:, -1:]
        if self.cache is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        positions = (self.mask.cumsum(1) - 1).clamp_(min=0)[:, -new.shape[1] :]
        place = self.mixture.model.device
        output = self.mixture.model(
            input_ids=new.to(place),
            attention_mask=self.mask.to(place),
            position_ids=positions.to(place),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache, share = output.past_key_values, self.mixture.share
        other = output.logits[:, -1].float().log_softmax(-1).to(scores.device) + math.log(share)
        return torch.logaddexp(scores.log_softmax(-1) + math.log1p(-share), other)


class _Draw(LogitsProcessor):
    """Leaves one token in each row: the one at which the sum of the probabilities passes that row's uniform number.

    draws: (rows, tokens), float64. width: of the prompts.
    """

    def __init__(self, draws: Tensor, width: int) -> None:
        self.draws = draws
        self.width = width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        mass = scores.double().softmax(-1).cumsum(-1)
        place = self.draws[:, input_ids.shape[1] - self.width, None] * mass[:, -1:]
        token = torch.searchsorted(mass, place, right=True).clamp_(max=mass.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


class Progress:
    """Tells how far generation is, every few seconds.

    prompts: how many there are. what: is written.
    """

    def __init__(self, console: "Console | None", prompts: int, what: str = "responses") -> None:
        self.console = console
        self.prompts = prompts
        self.what = what
        self.done = self.tokens = 0
        self.begun = self.told = time.perf_counter()

    def add(self, prompts: int, tokens: int) -> None:
        """Take note of responses that are there, and their tokens."""
        self.done, self.tokens, now = self.done + prompts, self.tokens + tokens, time.perf_counter()
        if self.console is not None and now - self.told >= SECONDS:
            self.told = now
            seconds = now - self.begun
            left = round(seconds / self.done * (self.prompts - self.done))
            tell(
                self.console,
                f"{self.what}  {self.done:,}/{self.prompts:,}  {self.tokens / seconds:,.0f} tokens/s  "
                f"{left // 60}:{left % 60:02d} left",
            )
