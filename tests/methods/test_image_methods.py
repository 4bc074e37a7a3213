"""Every method on images: its inner terms against plain PyTorch, and whole runs, alone and over chains of tensors."""

import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from families import IMAGES, tiny
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, ViTImageProcessor

from kdcli.distill.prepare import Prepared, prepare
from kdcli.distill.run import run_distill
from kdcli.errors import InputError
from kdcli.methods import registry
from kdcli.methods.base import Context
from kdcli.models.save import save_model
from kdcli.models.shape import shape_of
from kdcli.recipe.schema import Recipe
from kdcli.tasks import registry as kinds
from kdcli.training.step import Distiller

PAIRS = [(1, 2), (2, 4)]
CLASSES = 3
QUIET = Console(quiet=True)


def vit(layers: int, hidden: int = 32, *, seed: int = 0, patch: int = 4, **sizes: Any) -> PreTrainedModel:
    """Return a random classifier of images of 16 x 16 pixels whose tokens differ in size, one of them by far."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        image_size=16,
        patch_size=patch,
        num_labels=CLASSES,
        attn_implementation="eager",
        **sizes,
    )
    model = ViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
        # As some tokens of large models: their states outweigh those of all others.
        model.vit.embeddings.position_embeddings[:, 3] *= 60
        for block in (*model.vit.layers, model.vit):
            for norm in block.children():
                if isinstance(norm, nn.LayerNorm):
                    norm.weight.add_(1.0)
    return model


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(5, 3, 16, 16, generator=generator)
    return {"index": torch.arange(5), "pixel_values": pixels, "labels": torch.arange(5) % CLASSES}


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    return vit(4)


@pytest.fixture(scope="module")
def student() -> PreTrainedModel:
    return vit(2, seed=1)


def terms_of(
    name: str,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: dict[str, Tensor],
    options: dict[str, Any] | None = None,
    **context: Any,
) -> dict[str, Tensor]:
    """Return the values of all terms of a method, of all its stages."""
    method = registry.get(name)
    given = method.options(**(options or {}))
    shapes = shape_of(teacher.config), shape_of(student.config)
    chosen = Context(*shapes, "checkpoint", kinds.get("image-classification"), PAIRS, **context)
    method.check(given, chosen)
    found: dict[str, Tensor] = {}
    for stage in method.build(given, chosen):
        distiller = Distiller(student, stage.terms, kind=chosen.kind, teacher=teacher)
        distiller.train()
        student.eval()
        found |= distiller(batch)
        distiller.close()
    return found


def outputs_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Any, list[Tensor], dict[Any, Tensor]]:
    """Return what a model gives, its hidden states, the last of them after its norm, and its matrices' outputs."""
    found: dict[Any, Tensor] = {}
    handles = []
    for number, block in enumerate(model.vit.layers, 1):
        for path, module in block.named_modules():
            if isinstance(module, nn.Linear):
                keyed = (number, path.split(".")[-1])
                keep = lambda _, __, output, key=keyed: found.__setitem__(key, output)  # noqa: E731
                handles.append(module.register_forward_hook(keep))
    output = model(pixel_values=batch["pixel_values"], output_hidden_states=True, output_attentions=True)
    for handle in handles:
        handle.remove()
    *states, last = output.hidden_states
    return output, [*states, model.vit.layernorm(last)], found


def relative(own: Tensor, other: Tensor) -> Tensor:
    """Return the squared error of each token over the size of the teacher's, mean over all tokens of all images."""
    return ((own - other).square().sum(-1) / other.square().sum(-1)).mean()


def heads_of(vectors: Tensor, heads: int = 4) -> Tensor:
    return vectors.unflatten(-1, (heads, -1)).transpose(1, 2)


def scores_of(rows: Tensor, columns: Tensor, heads: int = 4) -> Tensor:
    left, right = heads_of(rows, heads), heads_of(columns, heads)
    return left @ right.mT / math.sqrt(left.shape[-1])


def divergence(own: Tensor, other: Tensor) -> Tensor:
    """Return KL of softmaxed scores, mean over heads, queries and images."""
    p, q = torch.log_softmax(other, -1), torch.log_softmax(own, -1)
    return (p.exp() * (p - q)).sum(-1).mean()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)


def test_hidden_states_are_compared_token_by_token(student: Any, teacher: Any, batch: dict[str, Tensor]):
    found = terms_of("hs", student, teacher, batch, {"weights": {"embedding": 1.0}})
    (output, own, _), (target, other, _) = outputs_of(student, batch), outputs_of(teacher, batch)
    assert own[0].shape == (5, 17, 32)
    close(found["hidden"], torch.stack([relative(own[s], other[t]) for s, t in PAIRS]).mean())
    close(found["embedding"], relative(own[0], other[0]))
    p, q = torch.log_softmax(target.logits, -1), torch.log_softmax(output.logits, -1)
    close(found["output"], (p.exp() * (p - q)).sum(-1).mean())
    close(found["task"], functional.cross_entropy(output.logits, batch["labels"]))
    # Not relative, the one token of great states is nearly all of the term.
    plain = terms_of("hs", student, teacher, batch, {"match_norm": False})["hidden"]
    close(plain, torch.stack([(own[s] - other[t]).square().mean() for s, t in PAIRS]).mean())
    error = (own[1] - other[2]).square().sum((0, 2))
    assert error[3] > 0.5 * error.sum()


def test_attention_and_values_of_the_last_block(student: Any, teacher: Any, batch: dict[str, Tensor]):
    found = terms_of("minilm", student, teacher, batch)
    (output, _, own), (target, _, other) = outputs_of(student, batch), outputs_of(teacher, batch)
    p, q = target.attentions[-1].log(), output.attentions[-1].log()
    close(found["attention"], (p.exp() * (p - q)).sum(-1).mean())
    values = own[(2, "v_proj")], other[(4, "v_proj")]
    close(found["value"], divergence(*(scores_of(side, side) for side in values)))


def test_relations_of_one_block(student: Any, teacher: Any, batch: dict[str, Tensor]):
    found = terms_of("minilmv2", student, teacher, batch, {"relation_heads": 8})
    own, other = outputs_of(student, batch)[2], outputs_of(teacher, batch)[2]
    expected = [
        divergence(*(scores_of(side, side, 8) for side in (own[(2, name)], other[(3, name)])))
        for name in ("q_proj", "k_proj", "v_proj")
    ]
    close(found["relation"], torch.stack(expected).sum())


def test_matrices_layers_and_embeddings(student: Any, teacher: Any, batch: dict[str, Tensor]):
    found = terms_of("makd", student, teacher, batch, {"terms": {"embedding": 1.0}})
    (output, states, own), (target, others, other) = outputs_of(student, batch), outputs_of(teacher, batch)

    def matrices(*names: str) -> Tensor:
        return torch.stack([relative(own[(s, name)], other[(t, name)]) for s, t in PAIRS for name in names]).mean()

    close(found["mha"], matrices("q_proj", "k_proj", "v_proj", "o_proj"))
    close(found["ffn"], matrices("fc1", "fc2"))
    close(found["hidden"], torch.stack([relative(states[s], others[t]) for s, t in PAIRS]).mean())
    close(found["embedding"], relative(states[0], others[0]))
    maps = [(target.attentions[t - 1].log(), output.attentions[s - 1].log()) for s, t in PAIRS]
    close(found["attention"], torch.stack([(p.exp() * (p - q)).sum(-1).mean() for p, q in maps]).mean())


def test_matrices_on_the_inputs_of_the_teacher(student: Any, teacher: Any, batch: dict[str, Tensor]):
    found = terms_of(
        "makd", student, teacher, batch, {"matrix_inputs": "teacher", "weights": {"layer": 0.0, "model": 0.0}}
    )
    inputs = {}
    hooks = [
        block.mlp.fc1.register_forward_pre_hook(lambda _, given, key=number: inputs.__setitem__(key, given[0]))
        for number, block in enumerate(teacher.vit.layers, 1)
    ]
    other = outputs_of(teacher, batch)[2]
    for hook in hooks:
        hook.remove()
    first = [relative(student.vit.layers[s - 1].mlp.fc1(inputs[t]), other[(t, "fc1")]) for s, t in PAIRS]
    second = [
        relative(student.vit.layers[s - 1].mlp.fc2(functional.gelu(other[(t, "fc1")])), other[(t, "fc2")])
        for s, t in PAIRS
    ]
    close(found["ffn"], torch.stack([*first, *second]).mean())


def test_scores_and_states_from_the_embeddings_on(student: Any, teacher: Any, batch: dict[str, Tensor]):
    found = terms_of("tinybert", student, teacher, batch)
    (_, states, own), (_, others, other) = outputs_of(student, batch), outputs_of(teacher, batch)
    scores = [
        [scores_of(side[(block, "q_proj")], side[(block, "k_proj")]) for side, block in ((own, s), (other, t))]
        for s, t in PAIRS
    ]
    close(found["attention"], torch.stack([(a - b).square().mean() for a, b in scores]).mean())
    close(found["hidden"], torch.stack([relative(states[m], others[2 * m]) for m in range(3)]).mean())


def test_directions_of_the_last_states(student: Any, teacher: Any, batch: dict[str, Tensor]):
    found = terms_of("distilbert", student, teacher, batch)
    own, other = outputs_of(student, batch)[1][-1], outputs_of(teacher, batch)[1][-1]
    close(found["cosine"], (1 - functional.cosine_similarity(own, other, dim=-1)).mean())


def test_the_patches_that_a_prediction_rests_on(student: Any, teacher: Any, batch: dict[str, Tensor]):
    found = terms_of("adkd", student, teacher, batch)

    def maps(model: PreTrainedModel) -> tuple[Tensor, list[Tensor]]:
        embedded = states = model.vit.embeddings(batch["pixel_values"])
        for block in model.vit.layers:
            states = block(states)
        logits = model.classifier(model.vit.layernorm(states)[:, 0])
        lengths = []
        for label in range(CLASSES):
            score = -torch.log_softmax(logits, -1)[:, label].sum()
            (gradient,) = torch.autograd.grad(score, embedded, create_graph=True)
            lengths.append(functional.normalize((gradient * embedded).norm(dim=-1), dim=-1))
        return logits, lengths

    (logits, own), (targets, others) = maps(student), maps(teacher)
    attribution = torch.stack([(a - b.detach()).square().mean() for a, b in zip(own, others, strict=True)]).sum()
    close(found["attribution"], attribution.detach())
    soft = functional.kl_div(torch.log_softmax(logits / 2, -1), torch.softmax(targets / 2, -1), reduction="batchmean")
    expected = 0.1 * functional.cross_entropy(logits, batch["labels"]) + 0.9 * soft + attribution
    weights = [student.vit.layers[0].mlp.fc1.weight, student.vit.embeddings.patch_embeddings.projection.weight]
    pairs = zip(*(torch.autograd.grad(loss, weights) for loss in (found["loss"], expected)), strict=True)
    for found_, expected_ in pairs:
        torch.testing.assert_close(found_, expected_, rtol=1e-3, atol=1e-5)


def test_bridges_between_widths(teacher: Any, batch: dict[str, Tensor]):
    narrow = vit(2, hidden=16, seed=1)
    for name, options in (("hs", {}), ("tinybert", {}), ("minilmv2", {"relation_heads": 8}), ("minilm", {})):
        found = terms_of(name, narrow, teacher, batch, options)
        assert all(value.isfinite() for value in found.values()), name


@pytest.mark.parametrize("family", IMAGES)
def test_every_family_has_what_methods_compare(family: str, batch: dict[str, Tensor]):
    teacher, student = tiny(family, layers=4, labels=CLASSES), tiny(family, labels=CLASSES, seed=1)
    for name in ("hs", "minilm", "makd", "adkd"):
        student.zero_grad()
        found = terms_of(name, student, teacher, batch, {"terms": {"attention": 0.0}} if name == "makd" else {})
        found["loss"].backward()
        gradients = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
        assert gradients and all(gradient.isfinite().all() for gradient in gradients), name
        inner = [value for key, value in found.items() if key not in ("loss", "output", "task")]
        assert inner and all(value > 0 for value in inner), (name, found)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(teacher: Any, batch: dict[str, Tensor]):
    for name in ("minilm", "minilmv2", "distilbert", "adkd", "kd"):
        method = registry.get(name)
        context = Context(*[shape_of(teacher.config)] * 2, "checkpoint", kinds.get("image-classification"), PAIRS)
        options = {"minilmv2": {"relation_heads": 8, "teacher_layer": -1}}.get(name, {})
        (stage,) = method.build(method.options(**options), context)
        distiller = Distiller(teacher, stage.terms, kind=context.kind, teacher=teacher)
        distiller.train()
        teacher.eval()
        found = {key: value for key, value in distiller(batch).items() if key not in ("loss", "task")}
        distiller.close()
        assert found and all(value.abs() < 1e-5 for value in found.values()), (name, found)


COARSE = {"form": "checkpoint"}
METHODS = ["kd", "hs", "minilm", "minilmv2", "makd", "tinybert", "distilbert", "theseus", "lgtm", "adkd"]
CHAINS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "svd": {"factorization": "svd"},
    "mpo": {"factorization": "mpo", "length": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher that was trained for a few steps, and squares of three colours as Parquet."""
    place = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 48), ("validation", 24)):
        labels = np.arange(count) % CLASSES
        pixels = generator.integers(0, 120, (count, 16, 16, 3), dtype=np.uint8)
        pixels[np.arange(count), 4:12, 4:12, labels] += 120
        images = [{"bytes": png(array), "path": None} for array in pixels]
        pq.write_table(pa.table({"image": images, "label": labels}), place / f"{split}.parquet")
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    for name, model in (("teacher", vit(4)), ("coarse", vit(2, patch=8))):
        (place / name).mkdir()
        save_model(model, place / name, processor)
    return place


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def distil(folder: Path, output: Path, method: Any, **others: Any) -> dict[str, Any]:
    """Return the record of a run of four steps."""
    parsed = Recipe.model_validate(recipe_of(folder, method, **others))
    return run_distill(parsed, recipe_path=output / "recipe.toml", output=output, console=QUIET).to_json()


def recipe_of(folder: Path, method: Any, **others: Any) -> dict[str, Any]:
    return {
        "name": "run",
        "task": {
            "name": "squares",
            "type": "image-classification",
            "train": str(folder / "train.parquet"),
            "validation": str(folder / "validation.parquet"),
        },
        "method": method,
        "teacher": {"model": str(folder / "teacher")},
        "train": {"max_steps": 4, "batch_size": 16, "learning_rate": 1e-3, "log_every": 1, "precision": "fp32"},
        **others,
    }


def planned(folder: Path, method: Any, **others: Any) -> Prepared:
    """Return what a dry run prepares."""
    return prepare(Recipe.model_validate(recipe_of(folder, method, **others)), folder / "recipe.toml")


@pytest.mark.parametrize("method", ["od", "embedding", "seqkd", "gkd", "minillm"])
def test_methods_of_texts_are_refused(method: str, folder: Path):
    with pytest.raises(InputError, match=rf"{method} works on .* squares is an image-classification task") as caught:
        planned(folder, method)
    assert set(caught.value.hint.removeprefix("use ").split(", ")) >= set(METHODS)


@pytest.mark.parametrize("method", ["hs", "minilm", "minilmv2", "makd", "tinybert", "distilbert", "adkd"])
def test_tokens_of_other_patches_are_not_compared(method: str, folder: Path):
    with pytest.raises(InputError, match=r"tokens of the student's 2 x 2 patches .* the teacher's 4 x 4") as caught:
        planned(folder, method, student=COARSE | {"model": str(folder / "coarse")})
    assert caught.value.where == "student" and "such as kd" in (caught.value.hint or "")


@pytest.mark.parametrize("method", ["kd", "lgtm", {"name": "distilbert", "weights": {"cosine": 0.0}}])
def test_outputs_of_other_patches_are_compared(method: Any, folder: Path):
    assert planned(folder, method, student=COARSE | {"model": str(folder / "coarse")}).method_notes == []


@pytest.mark.parametrize("method", ["hs", "tinybert"])
def test_students_keep_the_first_and_the_last_blocks_and_follow_them(method: str, folder: Path):
    (student,) = planned(folder, method).followers
    assert student.build.teacher_layers == [0, 3]
    assert student.context.pairs == [(1, 1), (2, 4)]


def cases() -> list[Any]:
    """Return every method alone and over chains; all but a few are slow."""
    quick = {("hs", "mpo"), ("makd", "plain")}
    pairs = [(method, chains) for method in METHODS for chains in CHAINS]
    return [pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize(("method", "chains"), cases())
def test_a_method_trains_a_plain_student_of_images(method: str, chains: str, folder: Path, tmp_path: Path):
    options = {"minilmv2": {"relation_heads": 8}, "tinybert": {"shares": [0.75, 0.25]}}.get(method, {})
    others = {"overparam": CHAINS[chains]} if CHAINS[chains] is not None else {}
    record = distil(folder, tmp_path, {"name": method, **options}, **others)
    assert record["status"] == "done"
    first, *_ = ([entry for entry in stage["history"] if "loss" in entry] for stage in record["training"])
    assert len(first) == (3 if method == "tinybert" else 4)
    assert all(math.isfinite(value) for entry in first for value in entry.values()), first
    # Which blocks run is drawn in every step of theseus.
    assert method == "theseus" or first[-1]["loss"] < first[0]["loss"], first

    saved = load_file(tmp_path / "run" / "student" / "model.safetensors")
    teacher = load_file(folder / "teacher" / "model.safetensors")
    matrices = [name for name in saved if ".layer" in name and saved[name].ndim == 2]
    if method == "makd":
        # Spread by what they are worth, ranks leave some matrices whole.
        weights = sum(tensor.numel() for name, tensor in teacher.items() if ".layer." in name and tensor.ndim == 2)
        assert 0.45 * weights < sum(saved[name].numel() for name in matrices) <= 0.5 * weights
    else:
        kept = record["teacher_layers"]
        sources = {name: re.sub(r"layer\.(\d+)", lambda m: f"layer.{kept[int(m[1])]}", name) for name in saved}
        assert {name: saved[name].shape for name in saved} == {name: teacher[sources[name]].shape for name in saved}
        still = [name for name in matrices if torch.allclose(saved[name], teacher[sources[name]], rtol=0, atol=1e-5)]
        assert len(matrices) == 2 * 6 and not still
    if chains == "plain":
        assert record["contraction"] is None
    else:
        assert len(record["contraction"]["matrices"]) == len(matrices)
        assert record["contraction"]["max_abs_difference"] < 1e-5


NARROW = {"form": "width", "hidden_size": 16, "heads": 4, "layers": 2}
PARTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "chains by importance": ("hs", {"overparam": {"select": "static", "matrices": 4}}),
    "chains that come": ("hs", {"overparam": {"select": "dynamic", "matrices": 4, "select_every": 1}}),
    "factors by weights": ("makd", {"student": {"form": "low-rank", "init": "svd", "ranks": "even"}}),
    "factors by inputs": ("makd", {"student": {"form": "low-rank", "init": "activations", "ranks": "even"}}),
    "factors by gradients": ("makd", {"student": {"form": "low-rank", "init": "gradients"}}),
    "factors one after the other": ("kd", {"student": {"form": "low-rank", "sequential": True}}),
    "stages": ({"name": "makd", "schedule": "staged", "shares": [0.5, 0.25, 0.25]}, {}),
    "projections": ("kd", {"student": {**NARROW, "init": "projections"}}),
    "projections of all but embeddings": (
        {"name": "hs", "weights": {"embedding": 1.0}},
        {"student": {**NARROW, "init": "projections"}},
    ),
    "no projections beside embeddings": (
        {"name": "tinybert", "shares": [0.5, 0.5]},
        {"student": {**NARROW, "init": "projections"}},
    ),
    "bridges of one for each block": ("hs", {"student": NARROW}),
    "a bridge of all blocks": ({"name": "tinybert", "shares": [0.5, 0.5]}, {"student": NARROW}),
    "vectors themselves": ({"name": "minilmv2", "direct": True, "relation_heads": 8}, {"student": NARROW}),
    "transport": ({"name": "hs", "layer_map": "emd", "emd": {"attention": True}}, {}),
    "random blocks": ({"name": "hs", "layer_map": "random"}, {}),
    "integrated gradients": ({"name": "adkd", "steps": 2, "top_k": 8}, {}),
    "an assistant": ("minilm", {"student": NARROW, "assistant": {"hidden_size": 16, "heads": 4}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_parts_of_methods_work_on_images(part: str, folder: Path, tmp_path: Path):
    method, others = PARTS[part]
    record = distil(folder, tmp_path, method, **others)
    assert record["status"] == "done"
    entries = [entry for stage in record["training"] for entry in stage["history"] if "loss" in entry]
    assert len(entries) >= 4
    assert all(math.isfinite(value) for entry in entries for value in entry.values()), entries


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hs", "minilmv2", "makd"])
def test_kept_states_train_as_the_teacher_does(method: str, folder: Path, tmp_path: Path):
    histories = []
    for cache in (True, "all"):
        (output := tmp_path / str(cache)).mkdir()
        options = {"minilmv2": {"relation_heads": 8}}.get(method, {})
        teacher = {"model": str(folder / "teacher"), "cache": cache}
        record = distil(folder, output, {"name": method, **options}, teacher=teacher)
        histories.append([entry["loss"] for entry in record["training"][0]["history"] if "loss" in entry])
    assert histories[1] == pytest.approx(histories[0], rel=1e-5)
