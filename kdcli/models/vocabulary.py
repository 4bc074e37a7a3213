"""A model with fewer pieces: its embeddings, the output layer over them, and the ids in its configuration."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcli.errors import InputError, RunError
from kdcli.models.blocks import body_of, module_at
from kdcli.models.families import family_of
from kdcli.models.inputs import model_inputs
from kdcli.models.lowrank import LowRankDecoder, LowRankEmbedding, LowRankLinear
from kdcli.models.save import stored_type
from kdcli.models.sentence_folder import prompts_of
from kdcli.models.shape import longest_input, shape_of
from kdcli.models.tokenizer_trim import Changes, Pieces, changes_of, check_cut, same_parts
from kdcli.words import counted

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TOLERANCE = 1e-4
"""Largest allowed difference of an output in fp32: a product of another size may be summed in another order."""

APART = 10
"""Where no text is held out, every tenth one of the corpus tells how the pieces of the others do on new text."""

OTHERS = f"every {APART}th text, with the pieces of the others"
SAMPLE = 32
"""How many texts, or parts of texts, a model reads before and after."""


@dataclass(frozen=True)
class Trimming:
    """Which pieces stay, the tokenizer that gives them, and what was found out about both.

    kept: their old ids; the new ones are their places. pieces: of the tokenizer before. rows: of the embeddings before.
    texts, tokens: of the corpus. sample: some of its texts that are cut as before. parts: of others that are, where
    there are few such texts. left_out: how others are cut, where pieces that the corpus uses are left out. held_out:
    how text is cut that did not choose the pieces, and held_out_text which that is; None where there is too little.
    told: what is to know of the files of text.
    """

    tokenizer: Any
    kept: np.ndarray
    pieces: int
    rows: int
    texts: int
    tokens: int
    sample: tuple[str, ...]
    parts: tuple[str, ...]
    left_out: Changes | None
    held_out: Changes | None
    held_out_text: str
    told: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return what a program should know: numbers before and after, and what is cut otherwise."""
        return {
            "pieces": [self.pieces, len(self.kept)],
            "rows": [self.rows, len(self.kept)],
            "texts": self.texts,
            "tokens": self.tokens,
            "left_out": self.left_out.to_json() if self.left_out is not None else None,
            "held_out": self.held_out.to_json() if self.held_out is not None else None,
            "compared_texts": len(self.sample),
            "compared_parts": len(self.parts),
        }

    def compared(self, difference: float | None, whose: str) -> str:
        """Say what `check_outputs` found for `sample` and `parts`; whose: of which model."""
        if difference is None:
            return f"outputs not compared with {whose}: no word of the text is read as before"
        parts = f" and {counted(len(self.parts), 'part')} of others" if self.parts else ""
        texts = f"{len(self.sample)} of {counted(self.texts, 'text')}"
        return f"outputs within {difference:.1e} of {whose}'s on {texts}{parts}"

    @property
    def notes(self) -> list[str]:
        """What a user should know."""
        found = [*self.told, f"{len(self.kept):,} of {self.pieces:,} pieces stay, from {counted(self.texts, 'text')}"]
        if self.rows > self.pieces:
            found.append(f"{counted(self.rows - self.pieces, 'row')} of embeddings without a piece: left out")
        if self.left_out is not None:
            found.append(f"of that text, {self.left_out.in_words}")
        if self.held_out is not None:
            found.append(f"of {self.held_out_text}, {self.held_out.in_words}")
        return found


def trim_vocabulary(
    tokenizer: Any,
    config: "PretrainedConfig",
    texts: Sequence[str],
    *,
    keep: int | None = None,
    min_count: int = 1,
    characters: bool = True,
    held_out: Sequence[str] | None = None,
    held_out_text: str = "the held-out text",
    needed: Iterable[int] = (),
    told: Sequence[str] = (),
    place: Callable[[str], str] = str,
) -> Trimming:
    """Choose the pieces that texts use, make a tokenizer of them, and check that it cuts these texts as before.

    The pieces of the model's own prompts stay in any case, and count for nothing else.

    config: of the model that reads them. keep, min_count, characters: as in `Pieces.choose`. held_out: texts that do
    not choose, and of which it is only told how they are cut; held_out_text: which they are. needed: ids that stay in
    any case. told: as in `Trimming`. place: what messages call `text`, `keep` and `min_count`.
    Raises InputError where no piece would stay, or fewer than must; RunError where a text is cut otherwise whose pieces
    all stay.
    """
    pieces = Pieces(tokenizer)
    corpus, prompts = pieces.read(texts), pieces.read(prompts_of(tokenizer))
    options: dict[str, Any] = {
        "keep": keep,
        "min_count": min_count,
        "characters": characters,
        "needed": {*needed_ids(config), *np.flatnonzero(pieces.counts(prompts)).tolist(), *needed},
        "place": place,
    }
    kept = pieces.choose(pieces.counts(corpus), **options)
    made = pieces.cut(kept)
    check_cut(prompts, made, kept)
    restricted = keep is not None or min_count > 1
    changed = check_cut(corpus, made, kept, unknown=pieces.unknown if restricted else None)
    same = np.flatnonzero(~changed)
    sample = same[:: max(1, len(same) // SAMPLE)][:SAMPLE]
    others = [text for text, other in zip(texts, changed, strict=True) if other]
    return Trimming(
        made,
        kept,
        len(pieces.of_id),
        shape_of(config).vocab or 0,
        len(texts),
        len(corpus.ids),
        tuple(texts[number] for number in sample),
        tuple(same_parts(others, pieces, made, kept, SAMPLE - len(sample))),
        changes_of(texts, pieces, made, kept) if others else None,
        _on_a_part(pieces, texts, options) if held_out is None else changes_of(held_out, pieces, made, kept),
        OTHERS if held_out is None else held_out_text,
        tuple(told),
    )


def _on_a_part(pieces: Pieces, texts: Sequence[str], options: dict[str, Any]) -> Changes | None:
    """Return how every tenth text is cut with the pieces of the others; None where there are fewer than ten."""
    if len(texts) < APART:
        return None
    own = pieces.read([text for place, text in enumerate(texts) if place % APART])
    try:
        kept = pieces.choose(pieces.counts(own), **options)
    except InputError:
        return None
    return changes_of(texts[::APART], pieces, pieces.cut(kept), kept)


def check_has_vocabulary(config: "PretrainedConfig", name: str, *, where: str, hint: str | None = None) -> None:
    """Raise InputError for a model that reads no text. name: the model's."""
    if family_of(config).reads != "text":
        raise InputError(f"{name} reads images, and has no vocabulary", where=where, hint=hint)


def needed_ids(config: "PretrainedConfig") -> set[int]:
    """Return the ids that a model's configuration names, and those that its padding token must keep its place for.

    A family that counts positions from the padding token's id on would read other positions after another id.
    """
    found = {number for ids in _token_ids(config).values() for number in ids}
    family = family_of(config)
    if family.first_position == "after-padding":
        found |= set(range(1 + (config.pad_token_id if family.padding is None else family.padding)))
    return {number for number in found if number < (shape_of(config).vocab or 0)}


def _token_ids(config: Any) -> dict[str, list[int]]:
    """Return the ids that a configuration names of tokens, each a list: a text may end with one of several."""
    found = {name: value for name, value in config.to_dict().items() if name.endswith("_token_id")}
    lists = {name: value if isinstance(value, list) else [value] for name, value in found.items()}
    return {name: ids for name, ids in lists.items() if all(isinstance(one, int) and one >= 0 for one in ids)}


def trimmed(model: "PreTrainedModel", kept: np.ndarray) -> "PreTrainedModel":
    """Return a copy of a model with the embeddings of these ids alone, in their order; all other tensors are shared.

    The output layer of a masked language model and its bias shrink with them. kept: rising ids.
    """
    rows = torch.from_numpy(kept)
    # A tied tensor is one object, and stays one.
    new = {id(old): _rows(old, rows) for old in _vocabulary(model)}
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    made = copy.deepcopy(model, {**shared, **new})
    number = {int(old): place for place, old in enumerate(kept)}
    for module in {_table(made), _holder(made)}:
        module.num_embeddings = len(kept)
        if module.padding_idx is not None:
            module.padding_idx = number[module.padding_idx]
    for module in _decoders(made):
        if isinstance(module, nn.Linear | LowRankLinear):
            module.out_features = len(kept)
    for config in _configs(made):
        for name, ids in _token_ids(config).items():
            left = [number[old] for old in ids if old in number]
            setattr(config, name, left if isinstance(getattr(config, name), list) else next(iter(left), None))
        field = family_of(made.config).sizes.vocabulary
        if field is not None and hasattr(config, field):
            setattr(config, field, len(kept))
    return made


def vocabulary_megabytes(model: "PreTrainedModel") -> float:
    """Return the megabytes (10^6 bytes, as the file stores them) of all weights that have a row a piece."""
    parts = {id(part): part for part in _vocabulary(model)}
    return round(sum(part.numel() for part in parts.values()) * stored_type(model).itemsize / 1e6, 3)


def _vocabulary(model: "PreTrainedModel") -> list[nn.Parameter]:
    return [_table(model).weight, *(part for m in _decoders(model) for part in m.parameters(recurse=False))]  # type: ignore[list-item]


def _holder(model: "PreTrainedModel") -> Any:
    """Return the word embeddings: a plain table, or one of two factors."""
    return module_at(model, family_of(model.config).word_embeddings)


def _table(model: "PreTrainedModel") -> nn.Embedding:
    """Return the table with a row a piece."""
    holder = _holder(model)
    return holder.down if isinstance(holder, LowRankEmbedding) else holder


def _decoders(model: "PreTrainedModel") -> list[Any]:
    """Return the modules of a head with an output a piece: a layer, and what has nothing but a bias for one.

    Of a layer of two factors both the whole and the factor that gives the output are there.
    """
    if model.base_model is model:
        return []
    rows, output = _table(model).num_embeddings, model.get_output_embeddings()
    layer = output.up if isinstance(output, LowRankLinear) else output
    inside = {id(module) for module in body_of(model).modules()}

    def has_rows(module: nn.Module) -> bool:
        own = dict(module.named_parameters(recurse=False))
        alone = list(own) == ["bias"] and own["bias"].shape == (rows,)
        last = (module is layer or module is output) and len(layer.weight) == rows
        return alone or isinstance(module, LowRankDecoder) or last

    return [m for m in model.modules() if id(m) not in inside and has_rows(m)]


def _rows(tensor: nn.Parameter, rows: Tensor) -> nn.Parameter:
    chosen = tensor.detach().index_select(0, rows.to(tensor.device))
    return nn.Parameter(chosen, requires_grad=tensor.requires_grad)


def _configs(model: "PreTrainedModel") -> list[Any]:
    found = [model.config, getattr(model.base_model, "config", None), getattr(model, "generation_config", None)]
    return list({id(config): config for config in found if config is not None}.values())


@torch.inference_mode()
def check_outputs(
    before: "PreTrainedModel",
    after: "PreTrainedModel",
    tokenizers: tuple[Any, Any],
    texts: Sequence[str],
    kept: np.ndarray,
    outputs: Sequence[str],
    *,
    longest: int = 64,
) -> float | None:
    """Return the largest difference of the outputs of a model and the trimmed one; over the vocabulary at kept pieces.

    None where there is no text. Each reads the texts by its own tokenizer. outputs: their names. Raises RunError when
    it is above `TOLERANCE`.
    """
    if not texts:
        return None
    limit = min(longest, tokenizers[0].model_max_length, longest_input(before.config) or longest)
    # Logits over a large vocabulary take much memory.
    size, worst, pieces = 1 if _decoders(before) else 8, 0.0, torch.from_numpy(kept)
    modes = before.training, after.training
    before.eval(), after.eval()
    for start in range(0, len(texts), size):
        found = []
        for model, tokenizer in zip((before, after), tokenizers, strict=True):
            part = list(texts[start : start + size])
            batch = tokenizer(part, truncation=True, max_length=limit, padding=True, return_tensors="pt")
            place = next(model.parameters()).device
            found.append(model(**model_inputs(model, {name: tensor.to(place) for name, tensor in batch.items()})))
        for name in outputs:
            old, new = (output[name].float().cpu() for output in found)
            old = old[..., pieces] if old.shape != new.shape else old
            worst = max(worst, float((old - new).abs().max()))
    before.train(modes[0]), after.train(modes[1])
    if not worst <= TOLERANCE:
        raise RunError(f"trimming the vocabulary changes the outputs by {worst:.2e} (allowed {TOLERANCE:g})")
    return worst
