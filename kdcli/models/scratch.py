"""A teacher from scratch: a small configuration, and a tokenizer trained on the task's own text."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from kdcli.errors import InputError
from kdcli.models.anatomy import FAMILIES
from kdcli.recipe.schema import ScratchSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Return a lower-casing WordPiece tokenizer of at most `vocab_size` tokens, trained on `texts`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL.values()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", tokenizer.token_to_id("[CLS]")), ("[SEP]", tokenizer.token_to_id("[SEP]"))],
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
    *,
    num_labels: int,
    seed: int,
    label_names: list[str] | None = None,
    problem_type: str | None = None,
) -> tuple["PreTrainedModel", Any]:
    """Return a randomly initialised classifier of `section`'s sizes, and its tokenizer.

    Raises InputError for an unknown family, or a width that its heads do not divide.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    if section.family not in FAMILIES:
        raise InputError(
            f"unknown family {section.family!r}; known are {', '.join(sorted(FAMILIES))}",
            where="teacher.scratch.family",
        )
    if section.hidden_size % section.heads:
        raise InputError(
            f"hidden_size {section.hidden_size} is not divisible by {section.heads} heads",
            where="teacher.scratch.heads",
        )
    anatomy = FAMILIES[section.family]
    tokenizer = train_tokenizer(texts, section.vocab_size)
    sizes = {
        anatomy.layers: section.layers,
        anatomy.hidden: section.hidden_size,
        anatomy.heads: section.heads,
        anatomy.intermediate: section.intermediate_size,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512 if section.family not in ("roberta", "xlm-roberta") else 514,
        "pad_token_id": tokenizer.pad_token_id,
        "num_labels": num_labels,
    }
    if section.family == "deberta-v2":
        sizes |= {"type_vocab_size": 2, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    if label_names is not None:
        sizes["id2label"] = dict(enumerate(label_names))
        sizes["label2id"] = {name: i for i, name in enumerate(label_names)}
    if problem_type is not None:
        sizes["problem_type"] = problem_type
    if section.family in ("roberta", "xlm-roberta"):
        sizes["type_vocab_size"] = 2
    if section.family == "electra":
        sizes["embedding_size"] = section.hidden_size
    torch.manual_seed(seed)
    config = AutoConfig.for_model(section.family, **sizes)
    return AutoModelForSequenceClassification.from_config(config).eval(), tokenizer
