"""Loading models and tokenizers: from safetensors only, with errors that say what to do.

A model is loaded whole or not at all: no parameter that its file lacks is made up, unless a new head is asked for.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcli.errors import InputError
from kdcli.models.checkpoint import (
    LOCAL,
    Checkpoint,
    Stored,
    check_beside,
    check_config,
    contained,
    is_structured,
    local_folder,
    looks_at_configurations,
    open_checkpoint,
    read_config,
)
from kdcli.models.classes import classifier_names
from kdcli.models.families import family_of
from kdcli.models.heads import (
    BASE,
    IMAGE_CLASSIFICATION,
    SENTENCE_EMBEDDING,
    Head,
    check_body,
    with_new_head,
    with_pooler,
)
from kdcli.models.quiet import quiet_transformers
from kdcli.models.sentence_folder import note_reading, with_modules
from kdcli.models.shape import longest_input
from kdcli.words import counted

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

OTHERS = (
    ("ForSentenceEmbedding", SENTENCE_EMBEDDING.title),
    ("ElectraForPreTraining", "a discriminator of replaced tokens"),
    ("ForTokenClassification", "a token classifier"),
    ("ForQuestionAnswering", "a question-answering model"),
    ("ForMultipleChoice", "a multiple-choice model"),
    ("ForNextSentencePrediction", "a next-sentence classifier"),
    ("ForCausalLM", "a causal language model"),
    ("LMHeadModel", "a causal language model"),
    ("ForSequenceClassification", "a classifier of texts"),
    ("ForImageClassification", IMAGE_CLASSIFICATION.title),
    ("ForImageClassificationWithTeacher", IMAGE_CLASSIFICATION.title),
    ("ForMaskedLM", "a masked language model"),
    ("ForPreTraining", "a masked language model"),
)
"""How the names of the library's classes end, and what they are, in words."""

PRETRAINED = (
    "cls.seq_relationship.",
    "cls.predictions.",
    "lm_head.",
    "lm_predictions.",
    "mask_predictions.",
    "predictions.",
    "sop_classifier.",
    "discriminator_predictions.",
    "generator_predictions.",
    "generator_lm_head.",
    "vocab_transform.",
    "vocab_layer_norm.",
    "vocab_projector.",
)
"""Heads that pretraining leaves in a file, beside the one that was trained later."""


def has_head(name: str | Path, head: Head, *, revision: str | None = None, trust_remote_code: bool = False) -> bool:
    """True when a checkpoint has a trained head, or one without weights; a body is there in any case."""
    return head.on_any_body or _has(open_checkpoint(name, revision, any_family=trust_remote_code), head)


def _has(checkpoint: Checkpoint, head: Head) -> bool:
    """True when a checkpoint has a head.

    The class that config.json names decides. Where it names none that says, a head counts only if the file has every
    weight of the library's class, and no other.
    """
    if head == BASE:
        return True
    named = checkpoint.architecture or ""
    if re.search(r"For[A-Z]|Model$", named):
        return head.is_of(named)
    if head.on_any_body:
        return False
    try:
        empty = _empty_model(checkpoint, head)
        check_body(empty.config, head, head.title)
    except InputError:
        return False
    return not any(_differences(empty, checkpoint.tensors))


def _title(checkpoint: Checkpoint) -> str:
    """Return what a checkpoint is, in words."""
    named = checkpoint.architecture or ""
    known = next((title for suffix, title in OTHERS if named.endswith(suffix)), None)
    return known or (f"a {named}" if "For" in named else BASE.title)


def refusal_of_head(name: str | Path, head: Head, *, revision: str | None = None) -> str:
    """Return the sentence that says which head a checkpoint lacks, and what it has instead."""
    title = _title(open_checkpoint(name, revision, any_family=True))
    return f"{name} has no trained head for {head.purpose} (it is {title})"


def load_config(name: str | Path) -> "PretrainedConfig":
    """Return a model's configuration without its weights; of kdcli's own folders that of the plain family."""
    raw = read_config(name)
    check_config(raw, name)
    return _plain_config(raw, name)


def _plain_config(raw: Mapping[str, Any], name: str | Path) -> "PretrainedConfig":
    from transformers import AutoConfig

    settings = {key: value for key, value in raw.items() if key not in ("model_type", "kdcli", *LOCAL)}
    own = raw.get("kdcli")
    family = own["base_model_type"] if is_structured(raw) and own else raw["model_type"]
    try:
        if (names := _class_names(settings)) is not None:
            settings["id2label"] = names
            settings["label2id"] = {text: number for number, text in names.items()}
        config: PretrainedConfig = AutoConfig.for_model(family, **settings)
    except Exception as error:
        # What a broken config.json makes the library raise has no common type.
        raise InputError(f"{name} cannot be loaded: {_reason(error)}") from error
    if sorted(config.id2label or {}) != list(range(len(config.id2label or {}))):
        raise InputError(f"{name}: id2label in its config.json does not number the classes from 0")
    return config


def _class_names(raw: Mapping[str, Any]) -> dict[int, str] | None:
    """Return the names of the classes by their numbers, where a config.json has either table of them."""
    names, numbers = raw.get("id2label"), raw.get("label2id")
    if isinstance(names, dict):
        return {int(number): str(text) for number, text in names.items()}
    # The library itself reads id2label alone.
    if isinstance(numbers, dict) and len({int(number) for number in numbers.values()}) == len(numbers):
        return {int(number): str(text) for text, number in numbers.items()}
    return None


def load_model(
    name: str | Path,
    head: Head,
    *,
    new_head: Mapping[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    weights: "torch.dtype | None" = None,
) -> "PreTrainedModel":
    """Load a model with a head in eval mode and fp32: a hub name, a folder, a low-rank or an over-parameterised one.

    Its configuration's `dtype` is the type that most of its weights have in the file. weights: another type for them
    than fp32, for a model that only predicts.

    new_head: put a randomly initialised one on the body, with these settings of its configuration.
    Raises InputError when there is no such model, its files are broken or do not hold each of its weights, its family
    is unknown, or when it has no such head and none was asked for.
    """
    checkpoint = open_checkpoint(name, revision, any_family=trust_remote_code)
    if new_head is None and head == SENTENCE_EMBEDDING and (checkpoint.pooled or not _has(checkpoint, head)):
        body = load_model(name, BASE, revision=revision, trust_remote_code=trust_remote_code)
        return with_modules(body, name, revision)
    if looks_at_configurations():
        return _shape(checkpoint, head, new_head, weights)
    if new_head is None and not _has(checkpoint, head):
        raise InputError(
            refusal_of_head(name, head, revision=revision),
            hint="name a model that has one; kdcli distill fine-tunes one without, when it is the recipe's teacher",
        )
    if trust_remote_code and "auto_map" in checkpoint.config:
        return _rounded(_load_remote(checkpoint, head, revision, new_head), weights)
    if checkpoint.structure is None:
        model = _load_plain(checkpoint, BASE if new_head is not None else head, weights).eval()
    else:
        model = _rounded(_load_structured(checkpoint, BASE if new_head is not None else head), weights).eval()
    check_body(model.config, head, name)
    if new_head is not None:
        _name_padding(model.config, head, checkpoint)
        return with_new_head(model, head, new_head)
    _read_generation(model, checkpoint)
    return model


def _read_generation(model: "PreTrainedModel", checkpoint: Checkpoint) -> None:
    """Give a model that generates text the settings for it that lie beside its weights, in place.

    Of settings that contradict each other, which the library reads but does not write, only the tokens' ids are taken.
    """
    from transformers import GenerationConfig

    name = "generation_config.json"
    folder = checkpoint.files[0].parent
    if not model.can_generate() or not (folder / name).is_file():
        return
    contained(folder, name)
    try:
        with quiet_transformers():
            found = GenerationConfig.from_pretrained(folder)
    except Exception as error:
        raise InputError(f"{folder / name} cannot be used: {_reason(error)}") from error
    try:
        found.validate(strict=True)
    except ValueError:
        ids = {key: value for key, value in found.to_dict().items() if key.endswith("_token_id")}
        found = GenerationConfig(**ids)
    model.generation_config = found


def _shape(
    checkpoint: Checkpoint, head: Head, new_head: Mapping[str, Any] | None, weights: "torch.dtype | None"
) -> "PreTrainedModel":
    """Return a model as its configuration alone says it, on the meta device."""
    import torch

    model = _empty_model(checkpoint, BASE if new_head is not None else head).eval()
    family_of(model.config)
    model.config.dtype = getattr(torch, checkpoint.dtype)
    if new_head is not None:
        with torch.device("meta"):
            model = with_new_head(model, head, new_head)
    return _rounded(model, weights)


def _rounded(model: "PreTrainedModel", weights: "torch.dtype | None") -> "PreTrainedModel":
    """Give a model's parameters another type; tables that it computes, such as rotations, stay as they are."""
    for parameter in model.parameters() if weights is not None else ():
        parameter.data = parameter.data.to(weights)
    return model


def _config_of(checkpoint: Checkpoint, head: Head) -> "PretrainedConfig":
    config = _plain_config(checkpoint.config, checkpoint.name)
    _name_padding(config, head, checkpoint)
    return config


def _name_padding(config: "PretrainedConfig", head: Head, checkpoint: Checkpoint) -> None:
    """Write the tokenizer's padding token into a configuration that names none, where the model needs one."""
    # What follows the last token of a text changes nothing in a decoder; a classifier on it looks for that token.
    family = family_of(config)
    if family.reads == "text" and config.pad_token_id is None and not (family.causal and (head == BASE or head.causal)):
        config.pad_token_id = _padding_of(checkpoint.name, checkpoint.revision)


def _padding_of(name: str | Path, revision: str | None = None) -> int:
    """Return the padding token of a model's own tokenizer, where its configuration names none."""
    try:
        number = load_tokenizer(name, revision).pad_token_id
    except InputError:
        number = None
    if number is None:
        raise InputError(
            f"{name}: config.json has no pad_token_id, and no tokenizer beside it has a padding token",
            hint="write the tokenizer's into config.json",
        )
    return int(number)


def _empty_model(checkpoint: Checkpoint, head: Head) -> "PreTrainedModel":
    """Return the model that a plain checkpoint's configuration describes, without memory for its weights.

    It has as many outputs as the weights have. Raises InputError where config.json says another number, or cannot
    be understood.
    """
    import torch

    config = _config_of(checkpoint, head)
    try:
        with torch.device("meta"), quiet_transformers():
            model = _bare(config, head, checkpoint.tensors)
            if _fit_outputs(model, checkpoint):
                model = _bare(model.config, head, checkpoint.tensors)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{checkpoint.name} cannot be loaded: {_reason(error)}") from error
    return model


def _bare(config: "PretrainedConfig", head: Head, tensors: Mapping[str, Stored]) -> "PreTrainedModel":
    """Return a model of a configuration; a base model has a pooler only where its file has one."""
    import torch

    model: PreTrainedModel = head.make(config, dtype=torch.float32)
    arguments = with_pooler(type(model), any(_is_pooler(key) for key in tensors)) if head == BASE else {}
    if not arguments or arguments["add_pooling_layer"] == (getattr(model, "pooler", None) is not None):
        return model
    return head.make(config, dtype=torch.float32, **arguments)  # type: ignore[no-any-return]


def _is_pooler(key: str) -> bool:
    return ".pooler." in f".{key}"


def _fit_outputs(model: "PreTrainedModel", checkpoint: Checkpoint) -> bool:
    """Give the configuration of `model` the number of outputs that the file has; True where it had another one."""
    key = next((f"{name}.weight" for name in classifier_names(model)), None)
    if key is None or key not in checkpoint.tensors:
        return False
    outputs = checkpoint.tensors[key].shape[0]
    if outputs == model.config.num_labels:
        return False
    raw = checkpoint.config
    if any(raw.get(key) is not None for key in ("id2label", "label2id", "num_labels")):
        raise InputError(
            f"{checkpoint.name}: the weights have {counted(outputs, 'output')} ({key}), config.json says "
            f"{model.config.num_labels}",
            hint="correct id2label (or label2id, num_labels) in config.json",
        )
    model.config.num_labels = outputs
    return True


def _places(model: "PreTrainedModel", tensors: Mapping[str, Any]) -> dict[str, str]:
    """Return the file's name for each tensor of `model`, by its name in the model; other heads are left out.

    A body alone is found in a file with a head, too, and a body in a file without its name before each weight's.
    """
    whole = family_of(model.config).part_of
    prefix = f"{model.base_model_prefix if whole is None else whole.part}."
    expected, renamed = model.state_dict().keys(), _renamings(model)

    def place(key: str) -> str:
        if key in expected:
            return key
        return next((name for name in (renamed(key), prefix + key, prefix + renamed(key)) if name in expected), key)

    if model.base_model is not model:
        return {place(key): key for key in tensors}
    inside = {place(key.removeprefix(prefix)): key for key in tensors if key.startswith(prefix)}
    children = {name for name, _ in model.named_children()}
    beside = {place(key): key for key in tensors if not key.startswith(prefix)}
    # Beside parts with that name there may be parts of other heads, which are called like those of a body.
    taken = children if not inside else expected - inside.keys()
    return inside | {name: key for name, key in beside.items() if name in taken or name.partition(".")[0] in taken}


def _renamings(model: "PreTrainedModel") -> Callable[[str], str]:
    """Return what gives the library's name of today for one that a file of `model` may have."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    found = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [one for one in found if isinstance(one, WeightRenaming)]
    return lambda key: apply_renamings(key, renamings)


def _differences(
    model: "PreTrainedModel", tensors: Mapping[str, Stored]
) -> tuple[list[str], list[str], list[tuple[str, tuple[int, ...], tuple[int, ...]]]]:
    """Return which weights of `model` a file lacks, which it has too many, and which have another shape there."""
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    places = _places(model, tensors)
    given = set(places)
    for one, other in model.all_tied_weights_keys.items():
        # A tied weight needs to be there once, under either name.
        if one in given or other in given:
            given |= {one, other}
    missing = [key for key in expected if key not in given]
    surplus = [key for key in places if key not in expected and not _may_be_left(model, key)]
    shapes = [
        (key, tensors[place].shape, expected[key])
        for key, place in places.items()
        if key in expected and tensors[place].shape != expected[key]
    ]
    return missing, surplus, shapes


def _may_be_left(model: "PreTrainedModel", key: str) -> bool:
    """True for what a file may hold beside a model: positions, mask tokens, poolers and heads that it does not use."""
    whole = family_of(model.config).part_of
    if whole is not None and key.startswith(whole.others):
        return True
    if _is_left_out(model, key):
        return True
    if key.endswith(("position_ids", "token_type_ids", "embeddings.mask_token")):
        return True
    if any(re.search(pattern, key) for pattern in model._keys_to_ignore_on_load_unexpected or ()):
        return True
    if _is_pooler(key):
        return getattr(model.base_model, "pooler", None) is None and not hasattr(model, "pooler")
    children = {name for name, _ in model.named_children()}
    return key.startswith(PRETRAINED[0]) or (key.startswith(PRETRAINED) and key.partition(".")[0] not in children)


def _is_left_out(model: "PreTrainedModel", key: str) -> bool:
    """True for a weight of a layer that another library's model has nothing in place of: of its own classifier."""
    from torch import nn

    if family_of(model.config).wraps is None:
        # A layer that a family's models never have is no part of their files, either.
        return False
    *parents, _ = key.split(".")
    module: Any = model
    for name in parents:
        module = getattr(module, name, None)
    return isinstance(module, nn.Identity)


def _check_weights(model: "PreTrainedModel", checkpoint: Checkpoint) -> None:
    """Raise InputError when a checkpoint has not exactly the weights of the model that its config.json describes."""
    missing, surplus, shapes = _differences(model, checkpoint.tensors)
    if missing:
        raise InputError(
            f"{checkpoint.name} is missing {_weights(missing)}",
            hint="is it another model's file, or an over-parameterised one? kdcli folders keep their config.json",
        )
    if surplus:
        raise InputError(
            f"{checkpoint.name} has {_weights(surplus)} for which its config.json has no place",
            hint="the configuration is another model's, or was changed: blocks, for example",
        )
    if shapes:
        key, found, said = shapes[0]
        raise InputError(f"{checkpoint.name}: {key} is {_by(found)}, and {_by(said)} by its config.json")


def _weights(keys: list[str]) -> str:
    return f"{counted(len(keys), 'weight')} (first: {keys[0]})"


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _load_plain(checkpoint: Checkpoint, head: Head, weights: "torch.dtype | None" = None) -> "PreTrainedModel":
    import torch

    empty = _empty_model(checkpoint, head)
    _check_weights(empty, checkpoint)
    kind: Any = type(empty)
    places = _places(empty, checkpoint.tensors)
    state, expected = checkpoint.state(), empty.state_dict()
    arguments = with_pooler(kind, getattr(empty, "pooler", None) is not None) if head == BASE else {}
    with quiet_transformers():
        try:
            model, report = kind.from_pretrained(
                None,
                config=empty.config,
                state_dict={key: state[place] for key, place in places.items() if key in expected},
                dtype=weights or torch.float32,
                output_loading_info=True,
                **arguments,
            )
        except Exception as error:
            raise InputError(f"{checkpoint.name} cannot be loaded: {_reason(error)}") from error
    assert not report["missing_keys"] and not report["mismatched_keys"]
    model.config.dtype = getattr(torch, checkpoint.dtype)
    return model


def _load_remote(
    checkpoint: Checkpoint, head: Head, revision: str | None, new_head: Mapping[str, Any] | None
) -> "PreTrainedModel":
    """Load a model by its own code, whose tensors only that code knows."""
    import torch
    from transformers import AutoConfig

    changes = dict(new_head or {})
    if not changes and checkpoint.config.get("id2label") is None and (known := _class_names(checkpoint.config)):
        changes["id2label"] = known
    code = {"revision": revision, "trust_remote_code": True}
    with quiet_transformers():
        try:
            model, report = head.auto_class().from_pretrained(
                checkpoint.name,
                config=AutoConfig.from_pretrained(checkpoint.name, **code, **changes),
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=new_head is not None,
                **code,
            )
        except Exception as error:
            raise InputError(f"{checkpoint.name} cannot be loaded: {_reason(error)}") from error
    model.config.dtype = getattr(torch, checkpoint.dtype)
    missing = sorted(report["missing_keys"] | {key for key, *_ in report["mismatched_keys"]})
    if new_head is not None:
        missing = [key for key in missing if key.startswith(f"{model.base_model_prefix}.") and not _is_pooler(key)]
    if missing:
        raise InputError(f"{checkpoint.name} is missing {_weights(missing)}")
    return model.eval()


def _reason(error: Exception) -> str:
    """Return the first line of an error that says something, or its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.rstrip().endswith(":")]
    return lines[0] if lines else type(error).__name__


def _load_structured(checkpoint: Checkpoint, head: Head) -> "PreTrainedModel":
    import torch

    config = _config_of(checkpoint, head)
    structure = checkpoint.structure
    assert structure is not None
    # A body is made with its own head, which is then left away: the structure is told by paths in the whole.
    model = _restored(config, head, structure, checkpoint)
    _check_weights(model, checkpoint)
    model.load_state_dict(checkpoint.state(), strict=False)
    model.config.dtype = getattr(torch, checkpoint.dtype)
    return model.base_model if head == BASE else model  # type: ignore[return-value]


def _whole(config: "PretrainedConfig", head: Head, checkpoint: Checkpoint) -> "PreTrainedModel":
    """Return a model of the class that a checkpoint was saved from, without its structure."""
    import torch
    import transformers

    own: Any = getattr(transformers, checkpoint.architecture or "", None)
    if family_of(config).part_of is not None and IMAGE_CLASSIFICATION.is_of(checkpoint.architecture or ""):
        return _bare(config, IMAGE_CLASSIFICATION, checkpoint.tensors)
    if head != BASE or own is None or BASE.is_of(checkpoint.architecture or ""):
        return _bare(config, head, checkpoint.tensors)
    return own._from_config(config, dtype=torch.float32)  # type: ignore[no-any-return]


def _restored(
    config: "PretrainedConfig", head: Head, structure: dict[str, Any], checkpoint: Checkpoint
) -> "PreTrainedModel":
    from kdcli.models.fused import make_layers
    from kdcli.models.lowrank import LowRankEmbedding, LowRankLinear, tie_decoders
    from kdcli.models.overparam import restore_overparam

    try:
        model = _whole(config, head, checkpoint)
        widest = max((length for tensor in checkpoint.tensors.values() for length in tensor.shape), default=0)
        for path, rank in {**structure.get("low_rank", {}), **structure.get("low_rank_embeddings", {})}.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= widest:
                raise ValueError(
                    f"config.json says rank {rank!r} for {path}, the file has tensors up to {widest:,} wide"
                )
        make_layers(model, [path for name in ("split", "low_rank") for path in structure.get(name, {})])
        for path, names in structure.get("split", {}).items():
            parts = [name for name, _ in model.get_submodule(path).named_children()]
            if parts != names:
                raise ValueError(f"config.json splits {path} into {names}, and its parts are {parts}")
        for path, rank in structure.get("low_rank", {}).items():
            linear: Any = model.get_submodule(path)
            factors = LowRankLinear(linear.in_features, linear.out_features, rank, bias=linear.bias is not None)
            _replace(model, path, factors)
        for path, rank in structure.get("low_rank_embeddings", {}).items():
            table: Any = model.get_submodule(path)
            _replace(model, path, LowRankEmbedding(table, rank))
        for path, source in structure.get("low_rank_decoders", {}).items():
            factored = model.get_submodule(source)
            if not isinstance(factored, LowRankEmbedding):
                raise ValueError(f"config.json ties {path} to {source}, which is no table of factors")
            tie_decoders(model, [path], factored)
        if "overparam" in structure:
            restore_overparam(model, structure["overparam"])
    except Exception as error:
        raise InputError(f"{checkpoint.name} cannot be restored: {_reason(error)}") from error
    return model


def _replace(model: "nn.Module", path: str, module: "nn.Module") -> None:
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def load_tokenizer(name: str | Path, revision: str | None = None) -> Any:
    """Load the tokenizer of a folder or a hub name, at a revision of it. Raises InputError when there is none.

    One of a decoder (it has no mask token) without a padding token pads with its end-of-text token.
    """
    from transformers import AutoTokenizer

    folder = local_folder(name)
    if folder is not None and not any(
        (folder / file).exists()
        for file in (
            "tokenizer.json",
            "vocab.txt",
            "vocab.json",
            "spm.model",
            "tokenizer.model",
            "sentencepiece.bpe.model",
        )
    ):
        raise InputError(
            f"{folder} has no tokenizer files",
            hint="save the tokenizer beside the model, or set teacher.tokenizer",
        )
    if folder is not None:
        check_beside(folder)
    with quiet_transformers():
        try:
            if folder is None:
                # Its errors say more of a name that is none.
                read_config(name, revision)
            tokenizer = AutoTokenizer.from_pretrained(
                folder or name, revision=revision or "main", trust_remote_code=False
            )
            note_reading(tokenizer, name, revision)
            if tokenizer.pad_token is None and tokenizer.mask_token is None and tokenizer.eos_token is not None:
                # Of a decoder's own padding nothing is ever read: any token of its vocabulary does.
                tokenizer.pad_token = tokenizer.eos_token
            return tokenizer
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"the tokenizer of {name} cannot be loaded: {_reason(error)}") from error


def check_tokenizer(
    model: Any, tokenizer: Any, max_length: int | None = None, *, where: str = "teacher.tokenizer"
) -> None:
    """Raise InputError when the tokenizer can give ids, or up to `max_length` positions, without an embedding.

    model: anything with a `config`. where: what names the tokenizer, or the model that it belongs to.
    """
    check_vocabulary(model.config, tokenizer, where=where)
    positions = longest_input(model.config)
    if max_length is None or positions is None:
        return
    longest = min(max_length, tokenizer.model_max_length)
    # Batches are padded to a multiple of 8.
    if -(-longest // 8) * 8 > positions:
        raise InputError(
            f"max_length {longest} is more than the {positions} positions that the model knows",
            where="task.max_length",
            hint=f"use at most {positions // 8 * 8}",
        )


def check_vocabulary(config: "PretrainedConfig", tokenizer: Any, *, where: str = "teacher.tokenizer") -> None:
    """Raise InputError when the tokenizer can give ids without an embedding, or none for padding."""
    rows = config.vocab_size
    # The number of an added token may be beyond the count of tokens.
    tokens = max([len(tokenizer), *(number + 1 for number in tokenizer.get_vocab().values())])
    if tokens > rows:
        raise InputError(
            f"the tokenizer has {tokens:,} tokens, but the model has embeddings for {rows:,}",
            where=where,
            hint="use the tokenizer that the model was trained with",
        )
    if tokenizer.pad_token_id is None:
        raise InputError(
            "the tokenizer has no padding token",
            where=where,
            hint="name it in tokenizer_config.json (pad_token), as it was in training",
        )


def check_same_tokens(tokenizer: Any, name: str | Path, where: str) -> None:
    """Raise InputError when the model `name` was trained with other tokens than those that `tokenizer` gives.

    A model that comes without a tokenizer of its own is not checked.
    """
    try:
        own = load_tokenizer(name).get_vocab()
    except InputError:
        return
    differing = [(number, token) for token, number in tokenizer.get_vocab().items() if own.get(token) != number]
    if differing:
        number, token = min(differing)
        theirs = next((word for word, place in own.items() if place == number), None)
        found = f"is {theirs!r}" if theirs is not None else "does not exist"
        raise InputError(
            f"both models must read the same tokens: number {number} is {token!r} to the teacher and {found} to {name}",
            where=where,
            hint="choose a student with the teacher's tokenizer",
        )


def load_any(
    name: str | Path, heads: Iterable[Head], *, revision: str | None = None, trust_remote_code: bool = False
) -> "PreTrainedModel":
    """Load a model with the head that its checkpoint has, one of `heads` or none.

    Raises InputError for another head.
    """
    heads = list(heads)
    checkpoint = open_checkpoint(name, revision, any_family=trust_remote_code)
    found = next((head for head in heads if _has(checkpoint, head)), BASE)
    named = checkpoint.architecture or ""
    if found == BASE and ("For" in named or named.endswith(BASE.unlike)):
        known = ", ".join(head.title for head in (*heads, BASE))
        raise InputError(f"{name} is {_title(checkpoint)}; kdcli knows {known}")
    return load_model(name, found, revision=revision, trust_remote_code=trust_remote_code)
