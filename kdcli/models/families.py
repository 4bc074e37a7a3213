"""Where each model family keeps its embeddings, its blocks and the six matrices of a block.

To add a family, add one row to `FAMILIES` and a tiny configuration to `tests/families.py`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdcli.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


BLOCK_MATRICES = ("query", "key", "value", "attention_output", "ffn_in", "ffn_out")
"""The six linear maps of a block, by their names in the literature."""


@dataclass(frozen=True)
class Anatomy:
    """Paths inside a model's body (`model.bert`, ...), and the names of its sizes in the configuration.

    `embeddings` names the module whose output is hidden[0]; `projection` a module after it, present only
    when the embeddings are narrower than the blocks, whose output takes that place.
    """

    family: str
    title: str
    blocks: str
    matrices: dict[str, str]
    embeddings: str = "embeddings"
    word_embeddings: str = "embeddings.word_embeddings"
    projection: str | None = None
    layers: str = "num_hidden_layers"
    hidden: str = "hidden_size"
    heads: str = "num_attention_heads"
    intermediate: str = "intermediate_size"


_BERT = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "ffn_in": "intermediate.dense",
    "ffn_out": "output.dense",
}


FAMILIES: dict[str, Anatomy] = {
    anatomy.family: anatomy
    for anatomy in (
        Anatomy("bert", "BERT", "encoder.layer", _BERT),
        Anatomy("roberta", "RoBERTa", "encoder.layer", _BERT),
        Anatomy("xlm-roberta", "XLM-RoBERTa", "encoder.layer", _BERT),
        Anatomy("electra", "ELECTRA", "encoder.layer", _BERT, projection="embeddings_project"),
        Anatomy(
            "distilbert",
            "DistilBERT",
            "transformer.layer",
            {
                "query": "attention.q_lin",
                "key": "attention.k_lin",
                "value": "attention.v_lin",
                "attention_output": "attention.out_lin",
                "ffn_in": "ffn.lin1",
                "ffn_out": "ffn.lin2",
            },
            layers="n_layers",
            hidden="dim",
            heads="n_heads",
            intermediate="hidden_dim",
        ),
        Anatomy(
            "deberta-v2",
            "DeBERTa-v2/v3",
            "encoder.layer",
            {
                **_BERT,
                "query": "attention.self.query_proj",
                "key": "attention.self.key_proj",
                "value": "attention.self.value_proj",
            },
        ),
    )
}


def anatomy_of(config: "PretrainedConfig") -> Anatomy:
    """Return the anatomy of a model's family.

    Raises InputError for an unknown family.
    """
    family = config.model_type
    if family not in FAMILIES:
        raise InputError(
            f"models of the family {family!r} are not known; known are {', '.join(sorted(FAMILIES))}",
            hint="a family is one row of the table in kdcli/models/anatomy.py: where its blocks and their six "
            "matrices are",
        )
    return FAMILIES[family]
