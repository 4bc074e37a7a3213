"""A teacher from scratch: a small configuration, and a tokenizer trained on the task's text or an image processor."""

from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from kdcli.errors import InputError
from kdcli.models import families
from kdcli.models.families import Family
from kdcli.models.heads import Head, check_body
from kdcli.models.processors import new_image_processor
from kdcli.models.shape import ffn_ratio, need_blocks
from kdcli.models.sizes import check_heads
from kdcli.recipe.schema import ScratchSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, padding: int = 0) -> Any:
    """Return a lower-casing WordPiece tokenizer of at most `vocab_size` tokens, made from `texts`.

    padding: the id of the padding token, 0 to 4.
    The vocabulary is every character, alone and as a continuation, and the most frequent words; ties are
    broken by the alphabet. (The library's own trainer breaks them by chance: no two runs would agree.)
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    characters = sorted({character for word in words for character in word})
    special = [token for token in SPECIAL.values() if token != SPECIAL["pad_token"]]
    special.insert(padding, SPECIAL["pad_token"])
    pieces = [*special, *characters, *(f"##{character}" for character in characters)]
    frequent = sorted(words, key=lambda word: (-words[word], word))
    room = max(0, vocab_size - len(pieces))
    pieces = list(dict.fromkeys([*pieces, *[w for w in frequent if len(w) > 1][:room]]))
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **SPECIAL,
    )


def build_scratch(
    section: ScratchSection,
    texts: Iterable[str],
    head: Head,
    settings: Mapping[str, Any] = MappingProxyType({}),
    *,
    seed: int,
) -> tuple["PreTrainedModel", Any]:
    """Return a randomly initialised model of `section`'s sizes with a head, and its processor.

    texts: that a tokenizer is made from. settings: of its configuration, such as num_labels.
    Raises InputError for an unknown family, one that has no such head, a width that its heads do not divide, and sizes
    of what the family does not read.
    """
    from transformers import AutoConfig

    family = families.get(section.family, where="teacher.scratch.family")
    need_blocks(family, "a teacher from scratch", "teacher.scratch.family")
    if section.hidden_size % section.heads:
        raise InputError(
            f"hidden_size {section.hidden_size} is not divisible by {section.heads} heads",
            where="teacher.scratch.heads",
        )
    check_heads(family, section.hidden_size, section.heads, "teacher.scratch.heads")
    check_body(AutoConfig.for_model(family.name), head, "the teacher", "teacher.scratch.family")
    _check_read(section, family)
    names = family.sizes
    sizes: dict[str, Any] = {
        **family.scratch,
        names.layers: section.layers,
        names.hidden: section.hidden_size,
        names.heads: section.heads,
    }
    if names.intermediate is not None:
        sizes[names.intermediate] = section.intermediate_size
    if names.ratio is not None:
        sizes[names.ratio] = ffn_ratio(names, section.hidden_size, section.intermediate_size)
    if names.embedding is not None:
        sizes[names.embedding] = section.hidden_size
    if names.kv_heads is not None:
        sizes[names.kv_heads] = section.heads
    if names.head is not None:
        sizes[names.head] = section.hidden_size // section.heads
    processor, own = _for_images(section, family) if family.reads == "images" else _for_texts(section, family, texts)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family.name, **sizes, **own, **settings)
    return head.make(config).eval(), processor


def _check_read(section: ScratchSection, family: Family) -> None:
    """Raise InputError for sizes of what the models of a family do not read."""
    others = {"text": ("image_size", "patch_size"), "images": ("vocab_size",)}[family.reads]
    if given := [name for name in others if name in section.model_fields_set]:
        what = "texts" if family.reads == "text" else "images"
        raise InputError(
            f"models of the family {family.title} read {what}", where=f"teacher.scratch.{given[0]}", hint="leave it out"
        )


def _for_texts(section: ScratchSection, family: Family, texts: Iterable[str]) -> tuple[Any, dict[str, Any]]:
    """Return a tokenizer made from texts, and what a configuration says of it."""
    tokenizer = train_tokenizer(texts, section.vocab_size, padding=family.padding or 0)
    names = family.sizes
    own: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id}
    if names.vocabulary is not None:
        own[names.vocabulary] = len(tokenizer)
    if names.positions is not None:
        own[names.positions] = 512 if family.first_position == "zero" else 514
    if family.causal:
        own |= {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    return tokenizer, own


def _for_images(section: ScratchSection, family: Family) -> tuple[Any, dict[str, Any]]:
    """Return an image processor for the size of a section, and what a configuration says of its images."""
    names, side = family.sizes, section.image_size
    given = {names.image: side, names.patch: section.patch}
    return new_image_processor(side, side), {name: size for name, size in given.items() if name is not None}
