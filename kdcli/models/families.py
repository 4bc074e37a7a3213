"""The table of model families: where each keeps its blocks and their matrices, and what its configuration calls them.

To add a family, add one row to `FAMILIES`, or offer a `Family` from another package as an entry point `kdcli.families`.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from kdcli.errors import InputError
from kdcli.offers import Offers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Attention = Literal["dot-product", "disentangled", "relative-bias"]

Reads = Literal["text", "images"]

MATRICES = ("query", "key", "value", "attention_output", "ffn_in", "ffn_gate", "ffn_out")
"""The linear maps of a block, by their names in the literature; few families have an `ffn_gate`."""


@dataclass(frozen=True)
class Matrix:
    """A linear map inside a block: a module, or share `part` of the `parts` of a fused module's output.

    by_head: the shares are not one after the other, but all those of a head are, head by head. transposed: the module
    holds its weight as (in, out).
    """

    path: str
    part: int = 0
    parts: int = 1
    by_head: bool = False
    transposed: bool = False


NONE = Matrix("")
"""In place of each matrix of a family whose blocks are not seen."""


@dataclass(frozen=True)
class SizeNames:
    """What a family's configuration calls its sizes.

    types: how many token types there are; None where the model takes none. embedding: the width of the embeddings,
    where it may differ from the blocks'. kv_heads: how many heads keys and values have, where these may be fewer.
    head: the width of one head, where it may be another than hidden / heads. as_hidden: further fields that are as wide
    as the blocks. by_block: lists with one entry a block. times: what `intermediate` is in hidden sizes where it is
    left out; None where it cannot be. ratio: a whole number that tells the feed-forward width in hidden sizes, in the
    place of `intermediate`; two_thirds: that width is two thirds of it, up to a multiple of 8. vocabulary, positions:
    None in a family that reads images, and image, patch, channels: None in one that reads text; an image and a patch
    have one side, or a height and a width. registers: how many tokens stand beside those of class and patches.
    """

    layers: str = "num_hidden_layers"
    hidden: str = "hidden_size"
    heads: str = "num_attention_heads"
    intermediate: str | None = "intermediate_size"
    vocabulary: str | None = "vocab_size"
    positions: str | None = "max_position_embeddings"
    types: str | None = "type_vocab_size"
    embedding: str | None = None
    kv_heads: str | None = None
    head: str | None = None
    as_hidden: tuple[str, ...] = ()
    by_block: tuple[str, ...] = ()
    times: int | None = None
    ratio: str | None = None
    two_thirds: bool = False
    image: str | None = None
    patch: str | None = None
    channels: str | None = None
    registers: str | None = None


@dataclass(frozen=True)
class Whole:
    """A model of which another family's models are a part: its checkpoints are read as that part.

    name: its `model_type`. config: the field of its configuration that is the part's. part: the part's name among its
    modules. others: what the names of all other tensors of its files begin with. settings: of the part's configuration,
    for what a classifier does not use.
    """

    name: str
    config: str
    part: str
    others: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class Family:
    """One family: paths inside a model's body (`model.bert`, ...), inside a block, and inside its configuration.

    name: the library's `model_type`. reads: what its models take, token ids or pixels. embeddings: the module whose
    output is hidden[0], or None where no one module gives what the first block gets; word_embeddings: the table of
    tokens, None in a family that reads images; projection: one after it, present only when the embeddings are narrower
    than the blocks, whose output takes that place.
    final_norm: a norm after the last block; the library's last hidden states are after it, and so are kdcli's.
    outputs_only: why nothing inside its models can be compared; `blocks` and all matrices are then left out.
    wraps: the library whose models stand inside the transformers library's.
    part_of: the larger models of which its models are a part.
    repeated: True where one block's weights are run `layers` times; one_of: fields that must then be 1.
    after_first: a module that some models have between their first and second block.
    first_only: weights that every block but the first has.
    attention: "disentangled" and "relative-bias" add terms of positions to q k^T; at_function: whether queries, keys
    and values pass through the library's attention interface, as they are compared there (after rotation, for example).
    causal: each token attends to those before it and to itself; both_ways: a field that, where it is true, lets it
    attend to those after it, too. score_cap: a field with the largest size of attention
    scores, which a hyperbolic tangent keeps them below. scores_by_number: a field that, where it is true, divides the
    scores of block l (from 1) by l.
    special: how many tokens stand before those of an image's patches, beside registers. scales: vectors in a block
    that multiply the outputs of matrices, feature by feature, by the matrices' names.
    variants: fields of the configuration that, where they are true, give other values to fields of this row.
    interpolates: whether positions of square images are interpolated to any other size, in a graph, too.
    rotary: heads have an even width. first_position: "after-padding" where positions are counted from the padding
    token's id on. positions_if: a field that says whether the model has positions of its own. padding: the id that
    its code takes for the padding token's, whatever its configuration says. scratch: what a configuration from
    scratch needs beside its sizes.
    """

    name: str
    title: str
    blocks: str = ""
    query: Matrix = NONE
    key: Matrix = NONE
    value: Matrix = NONE
    attention_output: Matrix = NONE
    ffn_in: Matrix = NONE
    ffn_out: Matrix = NONE
    ffn_gate: Matrix | None = None
    reads: Reads = "text"
    outputs_only: str | None = None
    wraps: Literal["timm"] | None = None
    part_of: Whole | None = None
    embeddings: str | None = "embeddings"
    word_embeddings: str | None = "embeddings.word_embeddings"
    projection: str | None = None
    final_norm: str | None = None
    repeated: bool = False
    one_of: tuple[str, ...] = ()
    after_first: str | None = None
    first_only: tuple[str, ...] = ()
    attention: Attention = "dot-product"
    at_function: bool = True
    causal: bool = False
    both_ways: str | None = None
    score_cap: str | None = None
    scores_by_number: str | None = None
    special: int = 0
    interpolates: bool = False
    scales: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: MappingProxyType({}))
    rotary: bool = False
    sizes: SizeNames = SizeNames()
    first_position: Literal["zero", "after-padding"] = "zero"
    positions_if: str | None = None
    padding: int | None = None
    scratch: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def matrices(self) -> dict[str, Matrix]:
        """The linear maps of a block by name, in the order of `MATRICES`."""
        return {name: matrix for name in MATRICES if (matrix := getattr(self, name)) not in (None, NONE)}

    @property
    def attention_module(self) -> str:
        """The path inside a block of the module that calls the attention function."""
        return self.query.path.rpartition(".")[0]

    @property
    def limits(self) -> dict[str, str]:
        """What does not work with its models: in a few words, and in full."""
        if self.outputs_only is not None:
            return {
                "outputs only": f"Only its outputs can be compared, because {self.outputs_only}. "
                "Its models teach and learn by methods that compare predictions alone, such as kd; a student has "
                'form = "checkpoint", and [overparam] takes the linear layers inside it. What needs blocks is refused: '
                "hidden states, attention, matrices, replaced blocks, students that are cut, narrowed or factorised, "
                "and [teacher.scratch]."
            }
        found = {}
        if self.attention != "dot-product":
            found["attention: no positions"] = (
                "Methods compare its attention by q k^T alone, without the terms of positions that it adds."
            )
        if self.repeated:
            found["no theseus; [overparam] takes all blocks"] = (
                "Its blocks share one block's weights: the method theseus, which replaces them one by one, does not "
                "work, and overparam.layers cannot choose among them."
            )
        if self.after_first is not None:
            found["theseus: no convolution"] = (
                f"Where a model has a module after its first block ({self.after_first}), the method theseus needs a "
                "student with as many blocks as the teacher."
            )
        if self.sizes.by_block:
            found["theseus: equal blocks only"] = (
                f"Its blocks may be of different kinds ({', '.join(self.sizes.by_block)}): the method theseus works "
                "where each student block replaces blocks of its own kind, as with as many blocks as the teacher."
            )
        others: dict[str, list[str]] = {}
        for name, changes in self.variants.items():
            own = replace(self, **changes, variants=MappingProxyType({})).limits
            for short in own.keys() - found.keys():
                others.setdefault(short, [own[short]]).insert(-1, name)
        for short, (*names, text) in others.items():
            found[f"{short} (some)"] = f"With {' or '.join(names)}: {text[0].lower()}{text[1:]}"
        return found

    def parts_of(self, path: str) -> list[str]:
        """Return the names of the matrices that share the module at `path` of a block, in the order of its output."""
        own = [(matrix.part, name) for name, matrix in self.matrices.items() if matrix.path == path]
        return [name for _, name in sorted(own)]


_BERT: dict[str, Any] = {
    "blocks": "encoder.layer",
    "query": Matrix("attention.self.query"),
    "key": Matrix("attention.self.key"),
    "value": Matrix("attention.self.value"),
    "attention_output": Matrix("attention.output.dense"),
    "ffn_in": Matrix("intermediate.dense"),
    "ffn_out": Matrix("output.dense"),
}

_ROBERTA: dict[str, Any] = {
    **_BERT,
    "first_position": "after-padding",
    "scratch": MappingProxyType({"type_vocab_size": 2}),
}


_LLAMA: dict[str, Any] = {
    "blocks": "layers",
    "query": Matrix("self_attn.q_proj"),
    "key": Matrix("self_attn.k_proj"),
    "value": Matrix("self_attn.v_proj"),
    "attention_output": Matrix("self_attn.o_proj"),
    "ffn_in": Matrix("mlp.up_proj"),
    "ffn_gate": Matrix("mlp.gate_proj"),
    "ffn_out": Matrix("mlp.down_proj"),
    "embeddings": "embed_tokens",
    "word_embeddings": "embed_tokens",
    "final_norm": "norm",
    "causal": True,
    "rotary": True,
    "sizes": SizeNames(types=None, kv_heads="num_key_value_heads", head="head_dim"),
}

_BY_LAYER: dict[str, Any] = {
    **_LLAMA,
    "sizes": SizeNames(types=None, kv_heads="num_key_value_heads", head="head_dim", by_block=("layer_types",)),
}

_GEMMA: dict[str, Any] = {**_BY_LAYER, "both_ways": "use_bidirectional_attention"}

_PIXELS = SizeNames(
    vocabulary=None,
    positions=None,
    types=None,
    image="image_size",
    patch="patch_size",
    channels="num_channels",
)

_VIT: dict[str, Any] = {
    "reads": "images",
    "blocks": "layers",
    "query": Matrix("attention.q_proj"),
    "key": Matrix("attention.k_proj"),
    "value": Matrix("attention.v_proj"),
    "attention_output": Matrix("attention.o_proj"),
    "ffn_in": Matrix("mlp.fc1"),
    "ffn_out": Matrix("mlp.fc2"),
    "word_embeddings": None,
    "final_norm": "layernorm",
    "special": 1,
    "interpolates": True,
    "sizes": replace(_PIXELS, as_hidden=("pooler_output_size",)),
}

_BEIT: dict[str, Any] = {
    **_VIT,
    "scales": MappingProxyType({"attention_output": "lambda_1", "ffn_out": "lambda_2"}),
    "variants": MappingProxyType(
        {
            name: {"attention": "relative-bias", "interpolates": False}
            for name in ("use_relative_position_bias", "use_shared_relative_position_bias")
        }
    ),
    "sizes": _PIXELS,
    # Without any of its tables the model would not know where a patch lies.
    "scratch": MappingProxyType({"use_relative_position_bias": True}),
}

_DINO: dict[str, Any] = {
    **_VIT,
    "blocks": "encoder.layer",
    "scales": MappingProxyType({"attention_output": "layer_scale1.lambda1", "ffn_out": "layer_scale2.lambda1"}),
}


def _dino(**names: Any) -> dict[str, Any]:
    sizes = replace(_PIXELS, intermediate=None, ratio="mlp_ratio", **names)
    gated = {
        "ffn_gate": Matrix("mlp.gate_proj"),
        "ffn_in": Matrix("mlp.up_proj"),
        "ffn_out": Matrix("mlp.down_proj"),
        "sizes": replace(sizes, two_thirds=True),
    }
    return {**_DINO, "sizes": sizes, "variants": MappingProxyType({"use_swiglu_ffn": gated})}


_TEXTS = ("text_model.", "logit_scale", "logit_bias")

_TOWER: dict[str, Any] = {
    "reads": "images",
    "blocks": "encoder.layers",
    "query": Matrix("self_attn.q_proj"),
    "key": Matrix("self_attn.k_proj"),
    "value": Matrix("self_attn.v_proj"),
    "attention_output": Matrix("self_attn.out_proj"),
    "ffn_in": Matrix("mlp.fc1"),
    "ffn_out": Matrix("mlp.fc2"),
    "word_embeddings": None,
    "interpolates": True,
    "sizes": _PIXELS,
}


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("bert", "BERT", **_BERT),
        Family("roberta", "RoBERTa", **_ROBERTA),
        Family("xlm-roberta", "XLM-RoBERTa", **_ROBERTA),
        Family("camembert", "CamemBERT", **_ROBERTA),
        Family(
            "electra",
            "ELECTRA",
            **_BERT,
            projection="embeddings_project",
            sizes=SizeNames(embedding="embedding_size"),
        ),
        Family(
            "distilbert",
            "DistilBERT",
            "transformer.layer",
            query=Matrix("attention.q_lin"),
            key=Matrix("attention.k_lin"),
            value=Matrix("attention.v_lin"),
            attention_output=Matrix("attention.out_lin"),
            ffn_in=Matrix("ffn.lin1"),
            ffn_out=Matrix("ffn.lin2"),
            sizes=SizeNames(layers="n_layers", hidden="dim", heads="n_heads", intermediate="hidden_dim", types=None),
        ),
        Family(
            "deberta-v2",
            "DeBERTa-v2/v3",
            **{
                **_BERT,
                "query": Matrix("attention.self.query_proj"),
                "key": Matrix("attention.self.key_proj"),
                "value": Matrix("attention.self.value_proj"),
            },
            after_first="encoder.conv",
            attention="disentangled",
            at_function=False,
            sizes=SizeNames(as_hidden=("pooler_hidden_size",)),
            positions_if="position_biased_input",
            scratch=MappingProxyType(
                {"type_vocab_size": 2, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
            ),
        ),
        Family(
            "mpnet",
            "MPNet",
            **{
                **_BERT,
                "query": Matrix("attention.attn.q"),
                "key": Matrix("attention.attn.k"),
                "value": Matrix("attention.attn.v"),
                "attention_output": Matrix("attention.attn.o"),
            },
            attention="relative-bias",
            at_function=False,
            sizes=SizeNames(types=None),
            first_position="after-padding",
            padding=1,
        ),
        Family(
            "albert",
            "ALBERT",
            "encoder.albert_layer_groups",
            query=Matrix("albert_layers.0.attention.query"),
            key=Matrix("albert_layers.0.attention.key"),
            value=Matrix("albert_layers.0.attention.value"),
            attention_output=Matrix("albert_layers.0.attention.dense"),
            ffn_in=Matrix("albert_layers.0.ffn"),
            ffn_out=Matrix("albert_layers.0.ffn_output"),
            projection="encoder.embedding_hidden_mapping_in",
            repeated=True,
            one_of=("num_hidden_groups", "inner_group_num"),
            sizes=SizeNames(embedding="embedding_size"),
        ),
        Family(
            "modernbert",
            "ModernBERT",
            "layers",
            query=Matrix("attn.Wqkv", 0, 3),
            key=Matrix("attn.Wqkv", 1, 3),
            value=Matrix("attn.Wqkv", 2, 3),
            attention_output=Matrix("attn.Wo"),
            # The gate is the half that goes through the activation (Shazeer 2020, arXiv 2002.05202, equation 2).
            ffn_gate=Matrix("mlp.Wi", 0, 2),
            ffn_in=Matrix("mlp.Wi", 1, 2),
            ffn_out=Matrix("mlp.Wo"),
            word_embeddings="embeddings.tok_embeddings",
            final_norm="final_norm",
            first_only=("attn_norm",),
            rotary=True,
            sizes=SizeNames(types=None, by_block=("layer_types",)),
            scratch=MappingProxyType(dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))),
        ),
        Family("llama", "Llama", **_LLAMA),
        Family("mistral", "Mistral", **_LLAMA),
        Family("qwen2", "Qwen2", **_BY_LAYER),
        Family("qwen3", "Qwen3", **_BY_LAYER),
        Family("gemma2", "Gemma 2", **_GEMMA, score_cap="attn_logit_softcapping"),
        Family("gemma3_text", "Gemma 3 (text)", **_GEMMA),
        Family(
            "phi3",
            "Phi-3",
            **{
                **_LLAMA,
                "query": Matrix("self_attn.qkv_proj", 0, 3),
                "key": Matrix("self_attn.qkv_proj", 1, 3),
                "value": Matrix("self_attn.qkv_proj", 2, 3),
                "ffn_gate": Matrix("mlp.gate_up_proj", 0, 2),
                "ffn_in": Matrix("mlp.gate_up_proj", 1, 2),
            },
        ),
        Family(
            "gpt2",
            "GPT-2",
            "h",
            query=Matrix("attn.c_attn", 0, 3, transposed=True),
            key=Matrix("attn.c_attn", 1, 3, transposed=True),
            value=Matrix("attn.c_attn", 2, 3, transposed=True),
            attention_output=Matrix("attn.c_proj", transposed=True),
            ffn_in=Matrix("mlp.c_fc", transposed=True),
            ffn_out=Matrix("mlp.c_proj", transposed=True),
            embeddings="drop",
            word_embeddings="wte",
            final_norm="ln_f",
            causal=True,
            scores_by_number="scale_attn_by_inverse_layer_idx",
            sizes=SizeNames(
                layers="n_layer",
                hidden="n_embd",
                heads="n_head",
                intermediate="n_inner",
                positions="n_positions",
                types=None,
                times=4,
            ),
        ),
        Family(
            "gpt_neox",
            "GPT-NeoX",
            "layers",
            query=Matrix("attention.query_key_value", 0, 3, by_head=True),
            key=Matrix("attention.query_key_value", 1, 3, by_head=True),
            value=Matrix("attention.query_key_value", 2, 3, by_head=True),
            attention_output=Matrix("attention.dense"),
            ffn_in=Matrix("mlp.dense_h_to_4h"),
            ffn_out=Matrix("mlp.dense_4h_to_h"),
            embeddings="emb_dropout",
            word_embeddings="embed_in",
            final_norm="final_layer_norm",
            causal=True,
            rotary=True,
            sizes=SizeNames(types=None),
            scratch=MappingProxyType({"rotary_pct": 1.0}),
        ),
        Family(
            "opt",
            "OPT",
            "decoder.layers",
            query=Matrix("self_attn.q_proj"),
            key=Matrix("self_attn.k_proj"),
            value=Matrix("self_attn.v_proj"),
            attention_output=Matrix("self_attn.out_proj"),
            ffn_in=Matrix("fc1"),
            ffn_out=Matrix("fc2"),
            embeddings=None,
            word_embeddings="decoder.embed_tokens",
            projection="decoder.project_in",
            final_norm="decoder.final_layer_norm",
            causal=True,
            sizes=SizeNames(intermediate="ffn_dim", types=None, embedding="word_embed_proj_dim"),
        ),
        Family("vit", "ViT", **_VIT),
        Family("deit", "DeiT", **{**_VIT, "special": 2}),
        Family("vit_msn", "ViT-MSN", **{**_VIT, "sizes": _PIXELS}),
        Family("ijepa", "I-JEPA", **{**_VIT, "special": 0}),
        Family("beit", "BEiT", **_BEIT),
        Family(
            "data2vec-vision",
            "Data2Vec (images)",
            **{
                **_BEIT,
                "blocks": "encoder.layer",
                "query": Matrix("attention.attention.query"),
                "key": Matrix("attention.attention.key"),
                "value": Matrix("attention.attention.value"),
                "attention_output": Matrix("attention.output.dense"),
                "ffn_in": Matrix("intermediate.dense"),
                "ffn_out": Matrix("output.dense"),
            },
            embeddings=None,
            at_function=False,
        ),
        Family("dinov2", "DINOv2", **_dino()),
        Family(
            "dinov2_with_registers",
            "DINOv2, registers",
            # Its interpolation smooths, which the exporter can do for one size alone.
            **{**_dino(registers="num_register_tokens"), "interpolates": False},
        ),
        Family(
            "swin",
            "Swin",
            reads="images",
            outputs_only="its blocks have other widths and other windows from stage to stage",
            embeddings=None,
            word_embeddings=None,
            sizes=replace(_PIXELS, by_block=("depths",)),
        ),
        Family(
            "timm_wrapper",
            "timm, as TinyViT",
            reads="images",
            outputs_only="models of timm differ in what is inside them",
            wraps="timm",
            embeddings=None,
            word_embeddings=None,
            sizes=replace(_PIXELS, image=None, patch=None, channels=None),
        ),
        Family(
            "clip_vision_model",
            "CLIP (images)",
            **_TOWER,
            embeddings="pre_layrnorm",
            special=1,
            part_of=Whole("clip", "vision_config", "vision_model", (*_TEXTS, "visual_projection.", "text_projection.")),
        ),
        Family(
            "siglip_vision_model",
            "SigLIP (images)",
            **_TOWER,
            final_norm="post_layernorm",
            part_of=Whole(
                "siglip",
                "vision_config",
                "vision_model",
                (*_TEXTS, "head.", "vision_model.head."),
                MappingProxyType({"vision_use_head": False}),
            ),
        ),
    )
}
"""The package's own families by name."""

OFFERS = Offers("kdcli.families", "family", Family, FAMILIES, where=None)
"""Those of other packages."""

ADVICE = "choose a model of one of these families; a package can add a family as an entry point kdcli.families"


def names() -> list[str]:
    """Return the names of all families, in the order of the alphabet."""
    return sorted(OFFERS.names())


def is_known(name: object) -> bool:
    """True for the name of a family."""
    return name in FAMILIES or name in OFFERS


def get(name: object, *, owner: object = None, where: str | None = None) -> Family:
    """Return a family. owner: the model that is of it, for messages; where: the recipe's field that names it.

    Raises InputError, which says what to add, where it is unknown, or the row of another package cannot be used.
    """
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    if isinstance(name, str) and name in OFFERS:
        return OFFERS.load(name)
    what = f"unknown family {name!r}" if owner is None else f"{owner} is of the unknown family {name!r}"
    near = difflib.get_close_matches(str(name), names(), n=1) if owner is None else []
    hint = f"did you mean {near[0]}?" if near else ADVICE
    raise InputError(f"{what}; known are {', '.join(names())}", where=where, hint=hint)


def family_of(config: "PretrainedConfig") -> Family:
    """Return the family of a model, and of it the variant that it is. Raises InputError where it is unknown."""
    family = get(config.model_type)
    for name, changes in family.variants.items():
        if getattr(config, name, False):
            family = replace(family, **changes)
    return family


def usable() -> tuple[list[Family], list[str]]:
    """Return all families that can be used, and a line for each that another package offers and that cannot."""
    found, problems = OFFERS.usable()
    return sorted([*FAMILIES.values(), *found], key=lambda family: family.name), problems
