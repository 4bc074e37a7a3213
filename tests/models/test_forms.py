"""Students cut from a teacher: which blocks and slices they keep, and that they are plain models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import NAMES, matrices, tiny, tokenizer
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, PreTrainedModel

from kdcli.distill.teacher import labelling_of
from kdcli.errors import InputError
from kdcli.methods import registry
from kdcli.methods.layer_maps import uniform
from kdcli.models.blocks import blocks_of
from kdcli.models.families import FAMILIES
from kdcli.models.lowrank import LowRankLinear
from kdcli.models.probe import probe
from kdcli.models.save import save_model
from kdcli.models.shape import shape_of
from kdcli.models.student import StudentBuild, build_student, chosen_layers
from kdcli.recipe.schema import StudentSection
from kdcli.tasks.classification import KIND as CLASSIFICATION


def depth(**values: Any) -> StudentSection:
    return StudentSection(form="depth", **values)


def width(**values: Any) -> StudentSection:
    return StudentSection(form="width", **values)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def block_states(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    return [block.state_dict() for block in blocks_of(model)]


def outside(model: PreTrainedModel) -> dict[str, Tensor]:
    prefix = f"{model.base_model_prefix}.{FAMILIES[model.config.model_type].blocks}."
    return {key: value for key, value in model.state_dict().items() if not key.startswith(prefix)}


def origins(family: str, *layers: int) -> tuple[int, ...]:
    """The blocks in memory of the teacher's `layers` (from 0)."""
    return (0,) if FAMILIES[family].repeated else layers


def loads_plainly(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return what the library's own loader makes of the saved model; nothing may be missing or left over."""
    save_model(model, folder)
    loaded, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded.eval()


@pytest.mark.parametrize(
    ("depth_", "wanted", "kept"),
    [
        (12, 6, [1, 3, 5, 7, 9, 11]),
        (12, 4, [2, 5, 8, 11]),
        (12, 3, [3, 7, 11]),
        (24, 6, [3, 7, 11, 15, 19, 23]),
        (5, 2, [2, 4]),
        (7, 3, [1, 4, 6]),
        (6, 1, [5]),
        (4, 4, [0, 1, 2, 3]),
    ],
)
def test_even_layers_end_with_the_last_block(depth_: int, wanted: int, kept: list[int]):
    assert chosen_layers(depth(layers=wanted), depth_) == kept


def test_a_block_starts_as_the_block_that_the_uniform_map_lets_it_follow():
    for teacher in range(1, 30):
        for student in range(1, teacher + 1):
            followed = [block - 1 for _, block in uniform(student, teacher)]
            assert chosen_layers(depth(layers=student), teacher) == followed


def test_even_layers_are_different_blocks_spread_over_the_whole_depth():
    for teacher in range(1, 30):
        for student in range(1, teacher + 1):
            kept = chosen_layers(depth(layers=student), teacher)
            gaps = [b - a for a, b in zip([-1, *kept], kept, strict=False)]
            assert len(kept) == student and kept[-1] == teacher - 1 and kept[0] >= 0
            assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 2


def test_a_distilbert_student_has_the_published_layers():
    section = StudentSection.model_validate({**registry.get("distilbert").student, "layers": 6})
    assert chosen_layers(section, 12) == [0, 2, 4, 7, 9, 11]


def test_a_decoder_keeps_its_first_and_last_blocks_unless_a_recipe_says_otherwise():
    assert chosen_layers(depth(layers=5, select="ends"), 12) == [0, 1, 9, 10, 11]
    assert chosen_layers(depth(layers=1, select="ends"), 12) == [0]
    for blocks in range(1, 13):
        kept = chosen_layers(depth(layers=blocks), 12, uneven=True)
        assert len(kept) == blocks and kept == chosen_layers(depth(layers=blocks, select="ends"), 12)
    assert chosen_layers(depth(layers=6, select="even"), 12, uneven=True) == chosen_layers(depth(layers=6), 12)


def test_first_last_and_named_layers():
    assert chosen_layers(depth(layers=3, select="first"), 12) == [0, 1, 2]
    assert chosen_layers(depth(layers=3, select="last"), 12) == [9, 10, 11]
    assert chosen_layers(depth(layers=[0, 5, 11]), 12) == [0, 5, 11]
    assert chosen_layers(depth(), 12) == chosen_layers(depth(layers=6), 12)
    assert chosen_layers(depth(), 1) == [0]


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (13, "12 blocks, so a student of 13"),
        ([0, 12], "blocks 0 to 11, not 12"),
        ([3, 1], "rising"),
        ([1, 1], "rising"),
        ([], "rising"),
    ],
)
def test_layers_that_the_teacher_does_not_have_are_refused(layers: int | list[int], words: str):
    with pytest.raises(InputError, match=words) as caught:
        chosen_layers(depth(layers=layers), 12)
    assert caught.value.where == "student.layers"


@pytest.mark.parametrize("family", NAMES)
def test_a_depth_student_is_a_plain_model_of_the_teachers_blocks(family: str, tmp_path: Path):
    teacher = tiny(family, layers=5)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    build = build_student(teacher, depth(layers=[0, 2, 3]), seed=0)
    student = build.model
    assert build.form == "depth" and build.teacher_layers == [0, 2, 3]
    assert type(student) is type(teacher) and shape_of(student.config).layers == 3
    plain = tiny(family, layers=3, seed=9)
    assert [(k, v.shape) for k, v in student.state_dict().items()] == [
        (k, v.shape) for k, v in plain.state_dict().items()
    ]
    for block, origin in zip(block_states(student), origins(family, 0, 2, 3), strict=True):
        assert same(block, block_states(teacher)[origin])
    assert same(outside(student), outside(teacher))
    assert same(teacher.state_dict(), before) and shape_of(teacher.config).layers == 5
    assert torch.equal(probe(loads_plainly(student, tmp_path)), probe(student))


@pytest.mark.parametrize("family", NAMES)
def test_a_depth_student_of_all_blocks_is_the_teacher_in_memory_of_its_own(family: str):
    teacher = tiny(family)
    student = build_student(teacher, depth(layers=2), seed=0).model
    assert torch.equal(probe(student), probe(teacher)) and not student.training
    own = {p.data_ptr() for p in student.parameters()}
    assert own.isdisjoint(p.data_ptr() for p in teacher.parameters())


@pytest.mark.parametrize("family", NAMES)
def test_random_blocks_of_a_depth_student_are_new_and_follow_the_seed(family: str):
    teacher = tiny(family, layers=4)
    student = build_student(teacher, depth(layers=2, init="random"), seed=3).model
    again = build_student(teacher, depth(layers=2, init="random"), seed=3).model
    other = build_student(teacher, depth(layers=2, init="random"), seed=4).model
    assert same(outside(student), outside(teacher))
    assert same(student.state_dict(), again.state_dict())
    for block, origin, third in zip(block_states(student), origins(family, 1, 3), block_states(other), strict=True):
        for key, value in block.items():
            if value.ndim > 1:
                assert not torch.equal(value, block_states(teacher)[origin][key])
                assert not torch.equal(value, third[key])
                # The usual standard deviation is 0.02 (ModernBERT: less for outputs), that of the tiny teachers 0.08.
                assert 0.005 < value.std() < 0.03


@pytest.mark.parametrize("family", NAMES)
def test_a_width_student_starts_from_leading_slices_of_the_teacher(family: str, tmp_path: Path):
    teacher = tiny(family, layers=4)
    build = build_student(teacher, width(hidden_size=16, layers=2), seed=0)
    student = build.model
    shape = shape_of(student.config)
    assert (shape.layers, shape.hidden, shape.heads, shape.intermediate) == (2, 16, 2, 32)
    assert build.teacher_layers == [1, 3]
    source, prefix = teacher.state_dict(), f"{teacher.base_model_prefix}.{FAMILIES[family].blocks}."
    fused = {matrix.path: matrix.parts for matrix in FAMILIES[family].matrices.values()}
    for key, value in student.state_dict().items():
        name = key
        if not FAMILIES[family].repeated:
            name = key.replace(f"{prefix}1.", f"{prefix}3.").replace(f"{prefix}0.", f"{prefix}1.")
        parts = next((count for path, count in fused.items() if f".{path}." in key), 1)
        for own, given in zip(value.chunk(parts), source[name].chunk(parts), strict=True):
            assert torch.equal(own, given[tuple(slice(0, size) for size in own.shape)])
    assert len(student.state_dict()) > 10
    assert torch.equal(probe(loads_plainly(student, tmp_path)), probe(student))


def test_a_width_student_of_the_teachers_own_width_is_the_teacher():
    teacher = tiny("roberta")
    assert torch.equal(probe(build_student(teacher, width(), seed=0).model), probe(teacher))


def test_a_random_width_student_shares_nothing_with_the_teacher():
    teacher = tiny("bert")
    build = build_student(teacher, width(hidden_size=16, init="random"), seed=0)
    assert build.teacher_layers is None
    table = build.model.bert.embeddings.word_embeddings.weight
    assert not torch.equal(table, teacher.bert.embeddings.word_embeddings.weight[:, :16])
    again = build_student(teacher, width(hidden_size=16, init="random"), seed=0).model
    assert same(build.model.state_dict(), again.state_dict())


def test_a_width_student_may_be_deeper_than_the_teacher():
    teacher = tiny("bert")
    build = build_student(teacher, width(hidden_size=16, layers=3), seed=0)
    assert shape_of(build.model.config).layers == 3 and build.teacher_layers == [0, 1]
    assert probe(build.model).isfinite().all()


def test_sizes_of_a_width_student_can_be_given_one_by_one():
    student = build_student(tiny("bert"), width(hidden_size=24, heads=6, intermediate_size=40), seed=0).model
    shape = shape_of(student.config)
    assert (shape.layers, shape.hidden, shape.heads, shape.intermediate) == (2, 24, 6, 40)


def test_an_electra_without_projection_gives_a_student_without_one():
    teacher = tiny("electra", embedding_size=32)
    student = build_student(teacher, width(hidden_size=16), seed=0).model
    assert list(student.state_dict()) == list(teacher.state_dict())
    table = student.electra.embeddings.word_embeddings.weight
    assert torch.equal(table, teacher.electra.embeddings.word_embeddings.weight[:, :16])


def test_a_width_that_its_heads_do_not_divide_is_refused_with_the_nearest_number():
    with pytest.raises(InputError, match="hidden_size 18 is not divisible by 4 heads") as caught:
        build_student(tiny("bert"), width(hidden_size=18, heads=4), seed=0)
    assert caught.value.where == "student.heads" and caught.value.hint == "use 3 heads"
    with pytest.raises(InputError, match="a number of layers"):
        build_student(tiny("bert"), width(layers=[0]), seed=0)


@pytest.mark.parametrize("family", NAMES)
def test_a_low_rank_student_leaves_the_teacher_alone(family: str):
    teacher = tiny(family)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    build = build_student(teacher, StudentSection(form="low-rank", rank=8), seed=0)
    assert build.teacher_layers == [0, 1]
    assert sum(isinstance(m, LowRankLinear) for m in build.model.modules()) == matrices(family)
    assert same(teacher.state_dict(), before)


LABELLING = labelling_of(CLASSIFICATION, ("a", "b", "c"))
ABC = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}


@pytest.mark.parametrize("kind", ["base", "token classifier"])
def test_a_checkpoint_without_a_trained_head_keeps_its_body_and_gets_the_teachers_labels(kind: str, tmp_path: Path):
    teacher = tiny("bert", layers=3, labels=3, **ABC)
    checkpoint = tiny("bert", layers=1, seed=1)
    other = checkpoint.bert if kind == "base" else AutoModelForTokenClassification.from_config(teacher.config)
    save_model(other, tmp_path, tokenizer())
    section = StudentSection(form="checkpoint", model=str(tmp_path))
    build = build_student(teacher, section, seed=5, labelling=LABELLING)
    assert build.teacher_layers is None
    assert build.model.config.id2label == {0: "a", 1: "b", 2: "c"}
    body = {key: value for key, value in other.base_model.state_dict().items() if "pooler" not in key}
    state = build.model.bert.state_dict()
    assert len(body) > 20 and all(torch.equal(value, state[key]) for key, value in body.items())
    assert build.model.classifier.weight.shape == (3, 32)
    again = build_student(teacher, section, seed=5, labelling=LABELLING)
    assert torch.equal(build.model.classifier.weight, again.model.classifier.weight)


@pytest.mark.parametrize("family", NAMES)
def test_a_checkpoints_trained_head_is_put_into_the_teachers_order_by_its_names(family: str, tmp_path: Path):
    teacher = tiny("bert", labels=3, **ABC)
    names = ["C", "a", "b"]
    checkpoint = tiny(family, layers=1, seed=1, labels=3, id2label=dict(enumerate(names)))
    save_model(checkpoint, tmp_path)
    section = StudentSection(form="checkpoint", model=str(tmp_path))
    student = build_student(teacher, section, seed=0, labelling=LABELLING).model
    assert torch.equal(probe(student), probe(checkpoint)[:, [1, 2, 0]])
    assert student.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_a_checkpoint_with_the_librarys_own_names_is_taken_to_have_the_teachers_order(tmp_path: Path):
    checkpoint = tiny("distilbert", layers=1, seed=1)
    save_model(checkpoint, tmp_path)
    section = StudentSection(form="checkpoint", model=str(tmp_path))
    student = build_student(tiny("bert"), section, seed=0, labelling=labelling_of(CLASSIFICATION, ("b", "a"))).model
    assert torch.equal(probe(student), probe(checkpoint))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, r"has 2 classes \(LABEL_0, LABEL_1\), the task has 3 \(a, b, c\)"),
        ({"labels": 3, "id2label": {0: "x", 1: "b", 2: "c"}}, r"\(x, b, c\) are not the task's labels \(a, b, c\)"),
        ({"labels": 3, "problem_type": "multi_label_classification"}, "is a multi-label classifier"),
    ],
)
def test_a_checkpoint_whose_classes_are_not_the_teachers_is_refused(settings: dict, words: str, tmp_path: Path):
    save_model(tiny("bert", layers=1, **settings), tmp_path)
    with pytest.raises(InputError, match=words) as caught:
        section = StudentSection(form="checkpoint", model=str(tmp_path))
        build_student(tiny("bert", labels=3, **ABC), section, seed=0, labelling=LABELLING)
    assert caught.value.where == "student.model" and caught.value.hint


def test_a_checkpoint_can_be_cut_to_some_of_its_blocks(tmp_path: Path):
    checkpoint = tiny("bert", layers=4, seed=1)
    save_model(checkpoint.bert, tmp_path, tokenizer())
    labelling = labelling_of(CLASSIFICATION, ("a", "b"))

    def cut(**fields: Any) -> StudentBuild:
        section = StudentSection(form="checkpoint", model=str(tmp_path), **fields)
        return build_student(tiny("bert", layers=2), section, seed=0, labelling=labelling)

    first = cut(layers=2, select="first")
    assert first.notes[-1] == "keeps blocks 0, 1 of its blocks 0 to 3" and first.form == "checkpoint"
    assert all(map(same, block_states(first.model), block_states(checkpoint)[:2]))
    assert len(blocks_of(first.model)) == first.model.config.num_hidden_layers == 2
    assert same(first.model.bert.embeddings.state_dict(), checkpoint.bert.embeddings.state_dict())
    chosen = cut(layers=[0, 3])
    assert all(map(same, block_states(chosen.model), [block_states(checkpoint)[layer] for layer in (0, 3)]))
    with pytest.raises(InputError, match=f"{tmp_path} has 4 blocks, so a student of 5 cannot be cut from it"):
        cut(layers=5)


def test_a_checkpoint_of_another_vocabulary_is_refused(tmp_path: Path):
    save_model(tiny("bert", vocab_size=100), tmp_path)
    with pytest.raises(InputError, match="100 tokens, the teacher's 220") as caught:
        section = StudentSection(form="checkpoint", model=str(tmp_path))
        build_student(tiny("bert"), section, seed=0, labelling=labelling_of(CLASSIFICATION, ("a", "b")))
    assert caught.value.where == "student.model"


def test_a_student_without_a_form_is_refused():
    with pytest.raises(InputError, match="no form"):
        build_student(tiny("bert"), StudentSection(), seed=0)


@pytest.mark.parametrize(
    "section",
    [
        StudentSection(form="depth", layers=1),
        StudentSection(form="width", hidden_size=16),
        StudentSection(form="low-rank", rank=2),
        StudentSection(form="low-rank", energy=0.5),
    ],
)
def test_no_student_is_cut_from_low_rank_factors(section: StudentSection):
    teacher = build_student(tiny("bert"), StudentSection(form="low-rank", rank=4), seed=0).model
    with pytest.raises(InputError, match="the teacher's are low-rank factors") as caught:
        build_student(teacher, section, seed=0)
    assert caught.value.where == "student.form"
    # Sizes alone can be taken from it.
    build_student(teacher, StudentSection(form="width", hidden_size=16, init="random"), seed=0)


def test_a_modernbert_student_takes_the_local_and_global_blocks_of_its_teacher_along():
    teacher = tiny("modernbert", layers=7)
    kinds = teacher.config.layer_types
    build = build_student(teacher, depth(layers=[1, 3, 6]), seed=0)
    assert build.model.config.layer_types == [kinds[1], kinds[3], kinds[6]]
    assert kinds[1] == "sliding_attention" and kinds[3] == kinds[6] == "full_attention"
    # The library's first block has no norm before its attention: the embeddings' norm is right below it.
    assert "without the attn_norm of block 1" in build.notes[-1]
    for layers, options, note in (
        ([0, 3], {}, "keeps blocks 0, 3 of the teacher's blocks 0 to 6"),
        ([1], {"init": "random"}, "has the shape of block 1 of the teacher's blocks 0 to 6"),
    ):
        assert build_student(teacher, depth(layers=layers, **options), seed=0).notes[:1] == [note]
    deeper = build_student(teacher, width(hidden_size=16, layers=9), seed=0).model
    assert deeper.config.layer_types == [*kinds, kinds[0], kinds[1]] and probe(deeper).isfinite().all()


def test_an_albert_student_runs_the_same_weights_less_often():
    teacher = tiny("albert", layers=6)
    build = build_student(teacher, depth(layers=2), seed=0)
    assert list(build.model.state_dict()) == list(teacher.state_dict())
    assert same(build.model.state_dict(), teacher.state_dict())
    assert build.notes == ["the teacher's one block, run 2 times instead of 6"]
    assert build.teacher_layers == [2, 5] and not torch.allclose(probe(build.model), probe(teacher))


def test_heads_that_cannot_be_rotated_are_refused():
    with pytest.raises(InputError, match="12 heads of 3 features: ModernBERT rotates pairs") as caught:
        build_student(tiny("modernbert"), width(hidden_size=36, heads=12), seed=0)
    assert caught.value.where == "student.heads"
