"""The families that read images: where their matrices are, and that captured signals are the library's own."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import IMAGES, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedModel

from kdcli.cli.app import run
from kdcli.errors import InputError
from kdcli.models.blocks import block_matrix, blocks_of, blocks_prefix, iter_block_matrices
from kdcli.models.capture import Capture
from kdcli.models.counts import count_parameters
from kdcli.models.families import FAMILIES, family_of
from kdcli.models.heads import BASE, IMAGE_CLASSIFICATION
from kdcli.models.load import load_model as load_body
from kdcli.models.lowrank import LowRankLinear, merge_low_rank
from kdcli.models.overparam import contract_model, overparameterise
from kdcli.models.probe import probe, probe_batch
from kdcli.models.projections import moments_of, project
from kdcli.models.save import save_model
from kdcli.models.scratch import build_scratch
from kdcli.models.shape import longest_input, shape_of
from kdcli.models.student import build_student
from kdcli.objectives.attention import attention_request
from kdcli.objectives.base import masked_log_softmax, own_keys
from kdcli.recipe.schema import OverparamSection, ScratchSection, StudentSection
from kdcli.signals import Request, Signals
from kdcli.tasks.heads import load_model
from kdcli.tasks.image_classification import KIND
from kdcli.tensors.projection import merge_projections

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in IMAGES},
    "beit-biased": ("beit", {"use_relative_position_bias": True}),
    "beit-shared": ("beit", {"use_shared_relative_position_bias": True, "use_absolute_position_embeddings": True}),
    "deit-distilled": ("deit", {"architectures": ["DeiTForImageClassificationWithTeacher"]}),
    "dinov2-gated": ("dinov2", {"use_swiglu_ffn": True, "mlp_ratio": 3}),
    "vit-wide": ("vit", {"image_size": [8, 16]}),
}
"""Every family, and what its configuration can make of it."""

SAME_NAMES = ("clip_vision_model", "data2vec-vision", "siglip_vision_model")
"""Families whose tensors have the names that they always had."""


def model_of(case: str, **extra: Any) -> PreTrainedModel:
    family, settings = CASES[case]
    model = tiny(family, layers=3, labels=5, **settings, **extra)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # Positions, class tokens and biases begin as zeros, scales of layers as equal numbers.
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


SOON = ("beit-biased", "data2vec-vision", "deit-distilled", "dinov2-gated", "vit")
"""Those that every run looks at whole; what takes longer than a look at the others is slow."""


@pytest.fixture(scope="module", params=CASES)
def every(request: pytest.FixtureRequest) -> PreTrainedModel:
    return model_of(request.param)


@pytest.fixture(
    scope="module", params=[pytest.param(case, marks=[pytest.mark.slow] * (case not in SOON)) for case in CASES]
)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return model_of(request.param)


def signals_of(model: PreTrainedModel, request: Request) -> Signals:
    capture = Capture(model, request, KIND)
    try:
        with capture:
            return capture.run(probe_batch(model))
    finally:
        capture.close()


def test_sizes_have_one_name_in_every_family(every: PreTrainedModel):
    shape = shape_of(every.config)
    assert (shape.layers, shape.hidden, shape.heads, shape.head, shape.intermediate) == (3, 32, 4, 8, 64)
    assert (shape.patch, shape.channels, shape.vocab) == (4, 3, None)
    states = every(**probe_batch(every), output_hidden_states=True).hidden_states
    assert {state.shape for state in states} == {(4, shape.tokens, 32)}
    assert longest_input(every.config) is None


def test_blocks_hold_the_matrices_and_no_other_linear_map(every: PreTrainedModel):
    found = dict(iter_block_matrices(every))
    assert len(found) == 3 * len(family_of(every.config).matrices)
    sides = {"ffn_in": (64, 32), "ffn_gate": (64, 32), "ffn_out": (32, 64)}
    for (_, name), matrix in found.items():
        assert matrix.weight.shape == sides.get(name, (32, 32))
    linear = {module for module in blocks_of(every).modules() if isinstance(module, nn.Linear)}
    assert linear == {matrix.module for matrix in found.values()}


def test_captured_hidden_states_are_the_librarys(every: PreTrainedModel):
    with torch.no_grad():
        signals = signals_of(every, Request(logits=True, hidden=frozenset(range(4))))
        alone = signals_of(every, Request(hidden=frozenset(range(3))))
        expected = every(**probe_batch(every), output_hidden_states=True)
        last = every.base_model(**probe_batch(every)).last_hidden_state
    assert len(expected.hidden_states) == 4
    for layer in (0, 1, 2):
        assert torch.equal(signals.hidden[layer], expected.hidden_states[layer])
        assert torch.equal(alone.hidden[layer], expected.hidden_states[layer])
    assert torch.equal(signals.hidden[3], last)
    assert torch.equal(signals.predictions[0].table, expected.logits)


@pytest.mark.parametrize("case", [case for case, (name, _) in CASES.items() if FAMILIES[name].at_function])
def test_attention_formed_from_captured_queries_and_keys_is_the_librarys(case: str):
    model = model_of(case)
    if family_of(model.config).attention != "dot-product":
        pytest.skip("the terms of positions are no part of q and k")
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        signals = signals_of(model, attention_request([1, 2, 3]) | Request(logits=True))
        expected = eager(**probe_batch(model), output_attentions=True)
    assert model.config._attn_implementation == "sdpa"
    for layer in (1, 2, 3):
        found = masked_log_softmax(signals.attention_scores(layer), own_keys(signals.mask, None)).exp()
        torch.testing.assert_close(found, expected.attentions[layer - 1], atol=1e-5, rtol=1e-5)


def test_captured_matrices_are_the_maps_of_their_inputs(every: PreTrainedModel):
    inputs: dict[str, Tensor] = {}
    matrices = {name: block_matrix(every, 2, name) for name in family_of(every.config).matrices}
    hooks = [
        matrix.module.register_forward_hook(
            lambda module, given, output, name=name: inputs.__setitem__(name, given[0])  # type: ignore[misc]
        )
        for name, matrix in matrices.items()
    ]
    signals = signals_of(every, Request(logits=True, matrices=frozenset((2, name) for name in matrices)))
    for hook in hooks:
        hook.remove()
    for name, matrix in matrices.items():
        torch.testing.assert_close(signals.matrices[(2, name)], matrix.module(inputs[name]), atol=1e-5, rtol=1e-5)


def state_shapes(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(key, tuple(value.shape)) for key, value in model.state_dict().items()]


def test_full_rank_factors_give_the_same_logits(model: PreTrainedModel, tmp_path: Path):
    factored = copy.deepcopy(model)
    for _, matrix in list(iter_block_matrices(factored)):
        linear: Any = matrix.linear()
        matrix.replace(LowRankLinear.from_linear(linear, min(linear.weight.shape)))
    torch.testing.assert_close(probe(factored), probe(model), atol=1e-4, rtol=0)
    save_model(factored, tmp_path)
    loaded = load_model(tmp_path)
    assert torch.equal(probe(loaded), probe(factored))
    merged = merge_low_rank(loaded)
    assert state_shapes(merged) == state_shapes(model)
    torch.testing.assert_close(probe(merged), probe(model), atol=1e-4, rtol=0)


def test_a_contracted_model_has_the_keys_the_shapes_and_the_logits_of_before(model: PreTrainedModel, tmp_path: Path):
    chained = copy.deepcopy(model)
    report = overparameterise(chained, OverparamSection(length=1))
    assert [(row.block, row.matrix) for row in report.rows] == [key for key, _ in iter_block_matrices(model)]
    torch.testing.assert_close(probe(chained), probe(model), atol=1e-4, rtol=0)
    save_model(chained, tmp_path)
    loaded = load_model(tmp_path)
    assert torch.equal(probe(loaded), probe(chained))
    contracted = contract_model(loaded)
    assert contracted.after == count_parameters(model) and (contracted.max_abs_difference or 0) < 1e-4
    assert state_shapes(loaded) == state_shapes(model)
    torch.testing.assert_close(probe(loaded), probe(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("form", ["depth", "width"])
def test_a_student_of_all_blocks_or_of_the_full_width_is_the_teacher(every: PreTrainedModel, form: Any):
    student = build_student(every, StudentSection(form=form, layers=3), seed=0).model
    assert type(student) is type(every)
    assert torch.equal(probe(student), probe(every))


def test_a_student_of_some_blocks_has_all_that_stands_in_them(model: PreTrainedModel, tmp_path: Path):
    student = build_student(model, StudentSection(form="depth", layers=[0, 2]), seed=0).model
    given, own = blocks_of(model)[2].state_dict(), blocks_of(student)[1].state_dict()
    assert list(own) == list(given) and all(torch.equal(own[key], given[key]) for key in own)
    save_model(student, tmp_path)
    assert torch.equal(probe(load_model(tmp_path)), probe(student))


def test_a_narrower_student_has_the_leading_features_of_every_vector(every: PreTrainedModel):
    student = build_student(every, StudentSection(form="width", hidden_size=16), seed=0).model
    shape = shape_of(student.config)
    assert (shape.hidden, shape.heads, shape.head, shape.intermediate) == (16, 2, 8, 32)
    given = every.state_dict()
    for key, own in student.state_dict().items():
        teacher = given[key]
        if own.ndim and teacher.shape[-1] == 64 and own.shape[-1] == 32 and "classifier" in key:
            # A head that reads two vectors reads the beginnings of both.
            own, teacher = own.unflatten(-1, (2, 16)), teacher.unflatten(-1, (2, 32))
        assert torch.equal(own, teacher[tuple(slice(0, size) for size in own.shape)]), key
    assert probe(student).shape == (4, 5)


def written_by_the_library(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """Save a model as the library does, by the names of its earlier versions, and return the file's tensors."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def test_files_by_older_names_are_read(model: PreTrainedModel, tmp_path: Path):
    tensors = written_by_the_library(model, tmp_path)
    assert (tensors.keys() == model.state_dict().keys()) == (model.config.model_type in SAME_NAMES)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model) and torch.equal(probe(loaded), probe(model))


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_body_is_read_from_either_file(model: PreTrainedModel, prefixed: bool, tmp_path: Path):
    tensors = written_by_the_library(model, tmp_path)
    if not prefixed:
        prefix = f"{model.base_model_prefix}."
        inside = {key.removeprefix(prefix): value for key, value in tensors.items() if "classifier" not in key}
        save_file(inside, tmp_path / "model.safetensors", {"format": "pt"})
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["SomeModel"]}))
    body = load_body(tmp_path, BASE)
    given, batch = body.state_dict(), probe_batch(model)
    assert all(torch.equal(value, given[key]) for key, value in model.base_model.state_dict().items())
    assert torch.equal(body(**batch)[0], model.base_model(**batch)[0])
    headed = load_body(tmp_path, IMAGE_CLASSIFICATION, new_head={"num_labels": 7})
    assert probe(headed).shape == (4, 7)
    assert torch.equal(headed.base_model(**batch)[0], body(**batch)[0])


def test_plain_transformers_reads_factors_of_every_family(model: PreTrainedModel, tmp_path: Path):
    student = build_student(model, StudentSection(form="low-rank", budget=0.5), seed=0).model
    save_model(student, tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and torch.equal(probe(loaded), probe(student))


def projected(teacher: PreTrainedModel, **fields: Any) -> PreTrainedModel:
    """Return a student of projections of `teacher`, in eval mode."""
    build = build_student(teacher, StudentSection(form="width", init="projections", **fields), seed=0)
    assert build.teacher_layers is not None
    generator = torch.Generator().manual_seed(3)
    pixels = probe_batch(teacher)["pixel_values"].shape[1:]
    batches = [{"pixel_values": torch.randn(32, *pixels, generator=generator)} for _ in range(2)]
    project(teacher, build.model, build.teacher_layers, moments_of(teacher, batches))
    return build.model.eval()


def test_at_full_width_a_student_of_projections_is_its_teacher(model: PreTrainedModel):
    student = projected(model)
    torch.testing.assert_close(probe(student), probe(model), atol=1e-4, rtol=0)
    merge_projections(student)
    assert state_shapes(student) == state_shapes(model)
    torch.testing.assert_close(probe(student), probe(model), atol=1e-4, rtol=0)


def test_all_vectors_of_a_narrow_student_of_projections_lie_in_one_space(model: PreTrainedModel):
    fields: dict[str, Any] = {"hidden_size": 24, "heads": 3}
    student, prefix = projected(model, **fields), blocks_prefix(model)
    before = probe(student)
    merge_projections(student)
    assert state_shapes(student) == state_shapes(
        build_student(model, StudentSection(form="width", **fields), seed=0).model
    )
    torch.testing.assert_close(probe(student), before, atol=1e-4, rtol=0)
    own, given = student.state_dict(), model.state_dict()
    (patches,) = [key for key in own if "patch_embedding" in key and key.endswith("weight")]
    space = torch.linalg.pinv(given[patches].flatten(1).double()).T @ own[patches].flatten(1).double().T
    compared = []
    for key, value in own.items():
        vectors = value.shape[-1] // 24 if value.ndim and value.shape[-1] % 24 == 0 else 0
        if key.startswith(prefix) or not vectors or not ("token" in key or "position" in key or vectors == 2):
            continue
        wanted = given[key].double().unflatten(-1, (vectors, 32)) @ space
        torch.testing.assert_close(value.double(), wanted.flatten(-2), atol=1e-4, rtol=1e-4, msg=key)
        compared.append(key)
    assert compared or model.config.model_type == "ijepa"


def test_gated_widths_are_two_thirds_of_the_plain_ones_and_narrower_students_keep_the_ratio():
    # int(96 * 2 / 3) = 64; of 40 hidden features and 4 of them a feature it is 112, up from 106.
    model = tiny("dinov2", hidden=40, use_swiglu_ffn=True, mlp_ratio=4)
    assert shape_of(model.config).intermediate == 112 == block_matrix(model, 1, "ffn_gate").weight.shape[0]
    student = build_student(model, StudentSection(form="width", hidden_size=20), seed=0).model
    assert student.config.mlp_ratio == 4 and shape_of(student.config).intermediate == 56
    with pytest.raises(InputError, match=r"whole hidden sizes \(mlp_ratio\), and 100 is none") as caught:
        build_student(model, StudentSection(form="width", hidden_size=20, intermediate_size=100), seed=0)
    assert (caught.value.where, caught.value.hint) == ("student.intermediate_size", "use 96")


def config_of(model: PreTrainedModel, folder: Path, **changes: Any) -> Path:
    """Save a model with changes of its config.json; None leaves a field out."""
    save_model(model, folder)
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("vit", {"image_size": 18}, "image_size 18 is not divisible by patch_size 4"),
        ("vit", {"image_size": [16, 18]}, "image_size \\[16, 18\\] is not divisible by patch_size 4"),
        ("vit", {"image_size": [16, 16, 16]}, "image_size is \\[16, 16, 16\\]"),
        ("vit", {"image_size": "16"}, "image_size is '16'"),
        ("vit", {"image_size": None}, "has no image_size"),
        ("vit", {"patch_size": 0}, "patch_size is 0"),
        ("vit", {"patch_size": 16}, "patch_embeddings.projection.weight is 32 x 3 x 4 x 4, and 32 x 3 x 16 x 16 by"),
        ("vit", {"num_channels": 1.5}, "num_channels is 1.5"),
        ("vit", {"num_channels": 1}, "patch_embeddings.projection.weight is 32 x 3 x 4 x 4, and 32 x 1 x 4 x 4 by"),
        ("vit", {"num_channels": 4000}, "num_channels is 4,000, and the largest tensor dimension in the file is 64"),
        ("vit", {"image_size": 400_000}, "the number of patches by image_size and patch_size is 10,000,000,000, and"),
        ("vit", {"num_hidden_layers": 3}, "says 3 blocks"),
        ("vit", {"num_attention_heads": 5}, "hidden_size 32 is not divisible by num_attention_heads 5"),
        ("deit", {"image_size": 8}, "position_embeddings is 1 x 18 x 32, and 1 x 6 x 32 by"),
        ("dinov2", {"mlp_ratio": None}, "has no mlp_ratio"),
        ("dinov2", {"mlp_ratio": 3}, "encoder.layer.0.mlp.fc1.bias is 64, and 96 by"),
        ("dinov2", {"mlp_ratio": 10**7}, "two thirds of hidden_size times mlp_ratio is 213,333,333, and"),
        ("dinov2", {"use_swiglu_ffn": True}, "is missing 12 weights \\(first: .*gate_proj"),
        ("dinov2_with_registers", {"num_register_tokens": -1}, "num_register_tokens is -1"),
        ("dinov2_with_registers", {"num_register_tokens": 9}, "register_tokens is 1 x 4 x 32, and 1 x 9 x 32 by"),
        ("beit", {"use_relative_position_bias": True}, "is missing 2 weights .*relative_position_bias_table"),
        (
            "beit",
            {"layer_scale_init_value": 0.0},
            "has 4 weights \\(first: .*lambda_1\\) for which its config.json has no",
        ),
    ],
)
def test_a_configuration_that_does_not_fit_its_file_is_refused(
    family: str, changes: dict[str, Any], words: str, tmp_path: Path
):
    with pytest.raises(InputError, match=words):
        load_model(config_of(tiny(family), tmp_path, **changes))


def test_a_file_without_a_position_table_is_refused(tmp_path: Path):
    save_model(tiny("vit"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["vit.embeddings.position_embeddings"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"is missing 1 weight \(first: vit.embeddings.position_embeddings\)"):
        load_model(tmp_path)


def test_there_are_no_word_embeddings_to_factorise():
    section = StudentSection(form="low-rank", budget=0.5, embedding_rank=4)
    with pytest.raises(InputError, match="a model that reads images has no word embeddings") as caught:
        build_student(tiny("vit"), section, seed=0)
    assert caught.value.where == "student.embedding_rank"


def test_families_are_listed_with_what_some_of_their_models_have(capsys: pytest.CaptureFixture[str]):
    assert run(["families", "beit", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["reads"], told["attention"]) == ("images", "dot-product or relative-bias")
    assert told["limits"] == ["attention: no positions (some)"]
    fields = "use_relative_position_bias or use_shared_relative_position_bias"
    assert told["limits_in_full"][0].startswith(f"With {fields}: methods compare its attention by q k^T alone")
    assert run(["families", "dinov2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["feed_forward"] == "plain or gated"


@pytest.mark.parametrize("family", IMAGES)
def test_a_model_from_scratch_knows_where_its_patches_lie(family: str):
    section = ScratchSection(
        family=family, layers=1, hidden_size=32, heads=4, intermediate_size=64, image_size=16, patch_size=4
    )
    settings = {"num_labels": 3}
    if FAMILIES[family].part_of is not None:
        pytest.skip("a part of a larger model")
    model, _ = build_scratch(section, [], IMAGE_CLASSIFICATION, settings, seed=0)
    shape = shape_of(model.config)
    assert (shape.image, shape.patch, shape.intermediate, shape.layers) == (16, 4, 64, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    pixels = probe_batch(model)["pixel_values"]
    turned = pixels.unflatten(3, (4, 4)).flip(3).flatten(3)
    assert (model(pixels).logits - model(turned).logits).abs().max() > 1e-3
