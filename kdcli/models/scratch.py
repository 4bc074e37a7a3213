"""A teacher from scratch: a small configuration, and a tokenizer trained on the task's own text."""

from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from kdcli.errors import InputError
from kdcli.models import families
from kdcli.models.heads import Head, check_body
from kdcli.models.shape import ffn_ratio
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
    """Return a randomly initialised model of `section`'s sizes with a head, and its tokenizer.

    settings: of its configuration, such as num_labels.
    Raises InputError for an unknown family, or a width that its heads do not divide.
    """
    from transformers import AutoConfig

    family = families.get(section.family, where="teacher.scratch.family")
    if section.hidden_size % section.heads:
        raise InputError(
            f"hidden_size {section.hidden_size} is not divisible by {section.heads} heads",
            where="teacher.scratch.heads",
        )
    check_heads(family, section.hidden_size, section.heads, "teacher.scratch.heads")
    tokenizer = train_tokenizer(texts, section.vocab_size, padding=family.padding or 0)
    names = family.sizes
    sizes: dict[str, Any] = {
        **family.scratch,
        names.layers: section.layers,
        names.hidden: section.hidden_size,
        names.heads: section.heads,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if names.intermediate is not None:
        sizes[names.intermediate] = section.intermediate_size
    if names.ratio is not None:
        sizes[names.ratio] = ffn_ratio(names, section.hidden_size, section.intermediate_size)
    if names.vocabulary is not None:
        sizes[names.vocabulary] = len(tokenizer)
    if names.positions is not None:
        sizes[names.positions] = 512 if family.first_position == "zero" else 514
    if names.embedding is not None:
        sizes[names.embedding] = section.hidden_size
    if names.kv_heads is not None:
        sizes[names.kv_heads] = section.heads
    if names.head is not None:
        sizes[names.head] = section.hidden_size // section.heads
    if family.causal:
        sizes |= {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family.name, **sizes, **settings)
    check_body(config, head, "the teacher", "teacher.scratch.family")
    return head.make(config).eval(), tokenizer
