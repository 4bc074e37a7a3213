"""Students of decoders: what of the teacher each form keeps, and what is saved, restored and generated."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import DECODERS, tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdcli.errors import InputError
from kdcli.models.blocks import block_matrix, blocks_of, iter_block_matrices, module_at
from kdcli.models.counts import count_parameters
from kdcli.models.families import family_of
from kdcli.models.generation import generate
from kdcli.models.heads import CAUSAL_LM
from kdcli.models.load import load_model
from kdcli.models.lowrank import LowRankDecoder, LowRankEmbedding, LowRankLinear, factorise, merge_low_rank
from kdcli.models.projections import is_projected, merge, moments_of, project
from kdcli.models.save import save_model
from kdcli.models.shape import shape_of
from kdcli.models.statistics import collect_statistics
from kdcli.models.student import build_student
from kdcli.recipe.schema import StudentSection

QUICK = ("llama", "gpt2", "gemma3_text")
"""Families whose tests run each time: grouped queries, fused and transposed matrices, blocks of different kinds."""


def families(*left_out: str) -> list[Any]:
    """Return all decoders as parameters of a test; those without anything of their own are slow tests."""
    found = [name for name in DECODERS if name not in left_out]
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in found]


def batches(count: int = 2, rows: int = 3, length: int = 12) -> list[dict[str, Tensor]]:
    """Return random texts, the last row of each batch padded."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(count):
        ids = torch.randint(5, 220, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, length // 2 :] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    """Return the logits of real tokens."""
    found = [model(**batch).logits[batch["attention_mask"].bool()] for batch in batches()]
    return torch.cat(found)


def close(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(one, other, atol=tolerance, rtol=0)


def built(teacher: PreTrainedModel, **fields: Any) -> PreTrainedModel:
    return build_student(teacher, StudentSection(**fields), seed=0).model


def greedy(model: Any) -> list[list[int]]:
    return generate(model, [[5, 17, 9], [33, 8, 120, 44, 7]], max_new_tokens=12, end=(), pad=0)


@torch.no_grad()
def greedy_without_cache(model: PreTrainedModel) -> list[list[int]]:
    found = []
    for prompt in ([5, 17, 9], [33, 8, 120, 44, 7]):
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        found.append(ids[len(prompt) :])
    return found


@pytest.mark.parametrize("family", families())
def test_a_depth_student_is_its_teacher_without_the_other_blocks(family: str):
    teacher = tiny(family, layers=4)
    student = built(teacher, form="depth", layers=[0, 3])
    for layer in (1, 2):
        skip = lambda module, given, output: (given[0], *output[1:]) if isinstance(output, tuple) else given[0]  # noqa: E731
        blocks_of(teacher)[layer].register_forward_hook(skip)
    close(logits_of(student), logits_of(teacher), 1e-5)
    # Each block has a place of its own in the cache.
    assert greedy(student) == greedy_without_cache(student)


@pytest.mark.parametrize("form", ["depth", "width", "projections"])
def test_blocks_whose_scores_depend_on_their_number_compute_what_they_did(form: str):
    teacher = tiny("gpt2", layers=6, scale_attn_by_inverse_layer_idx=True)
    with torch.no_grad():
        for _, matrix in iter_block_matrices(teacher):
            # Large enough for scores to matter.
            matrix.weight.normal_(std=0.5)
            matrix.module.bias.normal_()  # type: ignore[operator, union-attr]
    init = "projections" if form == "projections" else "teacher"
    build = build_student(
        teacher, StudentSection(form="depth" if form == "depth" else "width", init=init, layers=3), seed=0
    )
    if form == "projections":
        assert build.teacher_layers is not None
        project(teacher, build.model, build.teacher_layers, moments_of(teacher, batches()))
    assert build.teacher_layers == [0, 4, 5]
    for layer in (1, 2, 3):
        blocks_of(teacher)[layer].register_forward_hook(lambda module, given, output: given[0])
    close(logits_of(build.model), logits_of(teacher))


@pytest.mark.parametrize("family", families())
def test_slices_at_full_width_are_the_teacher(family: str):
    teacher = tiny(family)
    student = built(teacher, form="width")
    assert all(torch.equal(value, student.state_dict()[key]) for key, value in teacher.state_dict().items())


@pytest.mark.parametrize("family", families())
def test_a_narrow_student_has_heads_of_an_even_width_and_generates(family: str):
    teacher = tiny(family)
    student = built(teacher, form="width", hidden_size=16, heads=2)
    sizes, given = shape_of(student.config), shape_of(teacher.config)
    apart = given.heads * given.head != given.hidden
    assert (sizes.hidden, sizes.heads, sizes.kv_heads) == (16, 2, 2 * given.kv_heads // given.heads)
    assert sizes.head == (given.head if apart else 8) and sizes.intermediate == 32
    assert block_matrix(student, 1, "key").weight.shape == (sizes.kv_heads * sizes.head, 16)
    assert greedy(student) == greedy_without_cache(student)


@pytest.mark.parametrize(
    "family", ["llama", pytest.param("qwen3", marks=pytest.mark.slow), pytest.param("phi3", marks=pytest.mark.slow)]
)
def test_slices_keep_what_heads_and_features_do(family: str):
    teacher = tiny(family, rms_norm_eps=1e-12)
    shape = shape_of(teacher.config)
    apart = shape.heads * shape.head != shape.hidden
    hidden, heads = 16, 2
    # Of the teacher nothing counts but what the student has room for.
    with torch.no_grad():
        module_at(teacher, family_of(teacher.config).word_embeddings).weight[:, hidden:] = 0  # type: ignore[index, union-attr]
        for (_, name), matrix in iter_block_matrices(teacher):
            if name in ("attention_output", "ffn_out"):
                matrix.weight[hidden:] = 0
                matrix.weight[:, (heads * shape.head if name == "attention_output" else shape.intermediate // 2) :] = 0
    student = built(teacher, form="width", hidden_size=hidden, heads=heads)
    assert shape_of(student.config).head == (shape.head if apart else 8)
    for path, module in student.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 1 and not path.endswith(("q_norm", "k_norm")):
            # Both norms see the same features; the mean of their squares is over twice as many in the teacher.
            with torch.no_grad():
                weight *= math.sqrt(2)
    close(logits_of(student), logits_of(teacher))


def test_a_narrow_head_starts_from_the_pairs_that_positions_turn_most_alike():
    teacher = tiny("llama", hidden=64)
    with torch.no_grad():
        for _, matrix in iter_block_matrices(teacher):
            matrix.weight.copy_(torch.arange(len(matrix.weight), dtype=torch.float32)[:, None].expand_as(matrix.weight))
    student = built(teacher, form="width", hidden_size=32, heads=4)
    # Of 16 features, 8 pairs (i, i + 8), the even ones are turned by the angles of a head of 8.
    rows = block_matrix(student, 1, "query").weight[:, 0].tolist()
    assert rows[:8] == [0, 2, 4, 6, 8, 10, 12, 14] and rows[8:16] == [16 + row for row in rows[:8]]
    assert block_matrix(student, 1, "key").weight[:, 0].tolist() == rows[:16]
    # Where fewer heads share keys and values, each starts from one that shares those that its own start from.
    student = built(teacher, form="width", hidden_size=32, heads=2, kv_heads=2)
    assert block_matrix(student, 1, "query").weight[:, 0].tolist() == [*range(16), *range(32, 48)]
    assert block_matrix(student, 1, "attention_output").weight.shape == (32, 32)


@pytest.mark.parametrize("family", families("gemma2", "gemma3_text"))
@pytest.mark.parametrize("narrow", [{}, {"hidden_size": 16, "heads": 2, "intermediate_size": 40}])
def test_projections_of_a_decoder_start_train_and_merge(family: str, narrow: dict[str, Any]):
    teacher = tiny(family)
    build = build_student(teacher, StudentSection(form="width", init="projections", **narrow), seed=0)
    student = build.model
    assert build.teacher_layers is not None
    project(teacher, student, build.teacher_layers, moments_of(teacher, batches()))
    if not narrow:
        close(logits_of(student), logits_of(teacher))
    sliced = built(teacher, form="width", **narrow)
    student.train()
    student(**batches()[0]).logits.square().mean().backward()
    trained = [name for name, parameter in student.named_parameters() if ".parametrizations." in name]
    assert trained and all(student.get_parameter(name).grad is not None for name in trained)
    after = logits_of(student.eval())
    assert merge(student) > 0 and not is_projected(student)
    close(logits_of(student), after)
    assert {k: v.shape for k, v in student.state_dict().items()} == {k: v.shape for k, v in sliced.state_dict().items()}


def test_heads_that_do_not_fit_are_refused():
    teacher = tiny("llama")
    wrong = {
        "student.kv_heads": {"heads": 4, "kv_heads": 3},
        "student.heads": {"hidden_size": 12, "heads": 4},
        "student.hidden_size": {"hidden_size": 64, "init": "projections"},
    }
    for where, fields in wrong.items():
        with pytest.raises(InputError) as caught:
            built(teacher, form="width", **fields)
        assert caught.value.where == where and caught.value.hint
    with pytest.raises(InputError, match="as many heads of keys and values as of queries"):
        built(tiny("gpt2"), form="width", kv_heads=2)
    with pytest.raises(InputError, match="at most the teacher's 2 heads can share"):
        built(teacher, form="width", heads=4, kv_heads=1, init="projections")
    with pytest.raises(InputError, match="multiplies its embeddings"):
        built(tiny("gemma2"), form="width", hidden_size=16, heads=2, init="projections")


TABLES = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "untied": ("llama", {"tie_word_embeddings": False}),
    "scaled": ("gemma3_text", {}),
    "other bodies": ("gpt2", {}),
    "narrow": ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
}
"""Decoders with different ways from tokens to states and back."""

RANK = 6


@pytest.fixture(
    params=[
        "untied",
        "scaled",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("tied", "other bodies", "narrow")),
    ]
)
def of_low_rank(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A decoder whose table, and output layer, are of rank RANK."""
    family, settings = TABLES[request.param]
    model = tiny(family, **settings)
    with torch.no_grad():
        for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            weight.copy_(torch.randn(len(weight), RANK) @ torch.randn(RANK, weight.shape[1]) / RANK**0.5)
    return model


def test_factors_of_embeddings_give_the_same_logits_and_text(of_low_rank: PreTrainedModel, tmp_path: Path):
    model = of_low_rank
    student = copy.deepcopy(model)
    factorise(student, StudentSection(form="low-rank", budget=1.0, embedding_rank=RANK))
    close(logits_of(student), logits_of(model))
    table, output = module_at(student, family_of(model.config).word_embeddings), student.get_output_embeddings()
    assert isinstance(table, LowRankEmbedding)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert isinstance(output, LowRankDecoder if tied else LowRankLinear)
    rows, width = model.get_input_embeddings().weight.shape
    fewer = (1 if tied else 2) * (rows * width - RANK * (rows + width))
    assert count_parameters(model) - count_parameters(student) == fewer
    save_model(student, tmp_path)
    expected = greedy(student)
    assert expected == greedy_without_cache(student)
    for loaded in (load_model(tmp_path, CAUSAL_LM), AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
        assert torch.equal(logits_of(loaded), logits_of(student)) and count_parameters(loaded) == count_parameters(
            student
        )
        assert greedy(loaded) == expected
    merged = merge_low_rank(loaded)
    assert type(merged.get_input_embeddings()) is type(model.get_input_embeddings())
    close(logits_of(merged), logits_of(model))
    assert list(merged.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize(
    "family", ["gpt_neox", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "gpt2", "phi3"))]
)
def test_statistics_of_shares_are_those_of_layers_of_their_own(family: str):
    model = tiny(family)
    split = copy.deepcopy(model)
    for _, matrix in list(iter_block_matrices(split)):
        matrix.replace(matrix.linear())

    def loss_of(one: PreTrainedModel) -> Any:
        return lambda batch: (
            one(**batch).logits[:, :-1].log_softmax(-1)[..., 7].mul(batch["attention_mask"][:, 1:]).sum(1).mean()
        )

    found, expected = (collect_statistics(one, batches(), loss_of(one)) for one in (model, split))
    assert found.keys() == expected.keys() and len(found) == 2 * len(family_of(model.config).matrices)
    for key, of in expected.items():
        for name in ("mean", "covariance", "importance", "sensitivity"):
            torch.testing.assert_close(getattr(found[key], name), getattr(of, name), rtol=1e-4, atol=1e-6)


def test_students_keep_how_their_teacher_generates(tmp_path: Path):
    teacher = tiny("llama")
    teacher.generation_config.eos_token_id, teacher.generation_config.pad_token_id = [7, 9], 3
    (tmp_path / "teacher").mkdir()
    save_model(teacher, tmp_path / "teacher")
    teacher = load_model(tmp_path / "teacher", CAUSAL_LM)
    forms: dict[str, dict[str, Any]] = {"depth": {"layers": 1}, "width": {"hidden_size": 16}, "low-rank": {"rank": 4}}
    for form, fields in forms.items():
        (tmp_path / form).mkdir()
        save_model(built(teacher, form=form, **fields), tmp_path / form)
        for loaded in (load_model(tmp_path / form, CAUSAL_LM), AutoModelForCausalLM.from_pretrained(tmp_path / form)):
            settings = loaded.generation_config
            assert (settings.eos_token_id, settings.pad_token_id) == ([7, 9], 3)
    # The library reads, but does not write, settings without effect: of these the ids of tokens stay.
    path = tmp_path / "teacher" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "temperature": 0.6}))
    student = built(load_model(tmp_path / "teacher", CAUSAL_LM), form="depth", layers=1)
    save_model(student, tmp_path / "depth")
    assert student.generation_config.eos_token_id == [7, 9]
    path.write_text("{")
    with pytest.raises(InputError, match=r"generation_config\.json cannot be used"):
        load_model(tmp_path / "teacher", CAUSAL_LM)
