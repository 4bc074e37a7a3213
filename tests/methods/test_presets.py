"""od, hs, minilm, minilmv2, tinybert and distilbert: what each asks for, what it refuses, and real tiny models."""

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from objectives.worlds import asked
from pydantic import ValidationError
from safetensors.torch import save_model as save_weights
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PreTrainedModel

from kdcli.cli.methods import methods as methods_command
from kdcli.cli.methods import short_citation, tasks_of
from kdcli.distill.recipe import load_recipe
from kdcli.distill.resolve import resolve
from kdcli.errors import InputError
from kdcli.methods import registry
from kdcli.methods.base import Context, Stage
from kdcli.methods.layer_maps import layer_map, uniform
from kdcli.methods.minilmv2 import MiniLMv2Options, relation_heads
from kdcli.models.blocks import block_matrix, blocks_of
from kdcli.models.capture import Capture
from kdcli.models.counts import count_parameters
from kdcli.models.inputs import model_inputs
from kdcli.models.save import save_model
from kdcli.models.shape import ModelShape, shape_of
from kdcli.models.student import build_student
from kdcli.objectives.attention import AttentionObjective
from kdcli.objectives.hidden import HiddenObjective, token_mse
from kdcli.objectives.transport import EMDObjective
from kdcli.recipe.schema import StudentSection
from kdcli.signals import Request
from kdcli.tasks import registry as kinds
from kdcli.tasks.classification import KIND as CLASSIFICATION
from kdcli.tasks.heads import load_model
from kdcli.tasks.masked_lm import KIND as MASKED_LM
from kdcli.training.step import Distiller
from kdcli.training.trainer import load_weights

NAMES = ("od", "hs", "minilm", "minilmv2", "tinybert", "distilbert")
LENGTHS = (5, 9, 2, 7)


def shape(layers: int = 12, hidden: int = 768, heads: int = 12, vocab: int = 30522) -> ModelShape:
    heads = heads if hidden % heads == 0 else 1
    return ModelShape("bert", layers, hidden, heads, heads, hidden // heads, 4 * hidden, vocab, 512)


def context(
    kind: str = "text", student: ModelShape | None = None, teacher: ModelShape | None = None, form: str = "width"
) -> Context:
    student, teacher = student or shape(6), teacher or shape()
    return Context(teacher, student, form, kinds.get(kind), uniform(student.layers, teacher.layers))


def between(kind: str, student: PreTrainedModel, teacher: PreTrainedModel) -> Context:
    return context(kind, shape_of(student.config), shape_of(teacher.config))


def stages(name: str, where: Context, **options: Any) -> list[Stage]:
    method = registry.get(name)
    chosen = method.options.model_validate(options)
    method.check(chosen, where)
    return method.build(chosen, where)


def request(stage: Stage) -> tuple[Request, Request]:
    """What all terms of a stage ask of the student and of the teacher."""
    student, teacher = Request(), Request()
    for term in stage.terms:
        student |= term.objective.student_request()
        teacher |= term.objective.teacher_request()
    return student, teacher


def names(stage: Stage) -> dict[str, float]:
    return {term.name: term.weight for term in stage.terms}


def projections(layer: int, letters: str = "qkv") -> frozenset[tuple[int, str]]:
    return frozenset((layer, {"q": "query", "k": "key", "v": "value"}[letter]) for letter in letters)


def model(kind: str, family: str, **sizes: Any) -> PreTrainedModel:
    """A random tiny model: a classifier, a regressor, or a masked-LM model."""
    made = tiny(family, labels=1 if kind == "regression" else 3, **sizes)
    if kind != "text":
        return made
    torch.manual_seed(sizes.get("seed", 0))
    language_model = AutoModelForMaskedLM.from_config(made.config).eval()
    with torch.no_grad():
        for parameter in language_model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return language_model


def batch_of(kind: str, width: int = 12) -> dict[str, Tensor]:
    """The same sentences whatever the width: what is beyond their lengths is padding."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(5, 200, (len(LENGTHS), 64), generator=generator)[:, :width]
    mask = (torch.arange(width) < torch.tensor(LENGTHS)[:, None]).long()
    batch = {"input_ids": ids * mask, "attention_mask": mask, "index": torch.arange(len(LENGTHS))}
    if kind == "text":
        masked = (mask == 1) & (torch.arange(width) % 3 == 1)
        batch |= asked(mask, torch.where(masked, ids, -100))
    elif kind == "regression":
        batch["labels"] = torch.arange(len(LENGTHS)) / 3
    elif kind == "multi-label":
        batch["labels"] = torch.arange(3 * len(LENGTHS)).view(-1, 3) % 2 * 1.0
    else:
        batch["labels"] = torch.arange(len(LENGTHS)) % 3
    return batch


def terms_of(stage: Stage, student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor]) -> dict:
    kind = MASKED_LM if "masked_positions" in batch else CLASSIFICATION
    distiller = Distiller(student, stage.terms, teacher=teacher, kind=kind)
    distiller.train()
    student.eval()  # Dropout would make equal models differ.
    try:
        return distiller(batch)
    finally:
        distiller.close()


# What only compares both models, with nothing of the task itself in it.
COMPARISONS: list[tuple[str, str, dict[str, Any]]] = [
    ("od", "text", {}),
    ("od", "text", {"positions": "all", "temperature": 3.0}),
    *(("hs", kind, {"weights": {"embedding": 1.0}}) for kind in ("classification", "text")),
    ("hs", "regression", {"alpha": 1.0, "match_norm": True}),
    *(("hs", "text", {"layer_map": name}) for name in ("last", "last-k", "all", "uniform+last", "random", "emd")),
    ("hs", "text", {"layer_map": [[1, 1], [3, 3]]}),
    ("hs", "classification", {"layer_map": "emd", "emd": {"attention": True}, "alpha": 1.0}),
    ("minilm", "text", {}),
    ("minilm", "classification", {"alpha": 1.0, "temperature": 2.0}),
    ("minilmv2", "text", {"teacher_layer": -1}),
    ("minilmv2", "text", {"teacher_layer": -1, "relations": {"qk": 0.5, "vq": 1.0, "kk": 0.0}}),
    ("minilmv2", "text", {"teacher_layer": -1, "direct": True, "relation_heads": 4}),
    ("minilmv2", "regression", {"teacher_layer": -1, "alpha": 1.0}),
    ("tinybert", "text", {}),
    ("tinybert", "classification", {}),
    ("tinybert", "regression", {"alpha": 1.0}),
    ("distilbert", "text", {"weights": {"task": 0.0}}),
    ("distilbert", "classification", {"weights": {"task": 0.0}}),
]


def without_task(kind: str, options: dict[str, Any], name: str) -> dict[str, Any]:
    if kind != "text" and name in ("hs", "minilm", "minilmv2"):
        return {"alpha": 1.0, **options}
    return options


FAMILIES = ("bert", "electra", "deberta-v2")


def each(cases: list[tuple[str, str, dict[str, Any]]]) -> Any:
    """Run a test with each case, on one family after the other: what a family gives is checked where it is captured."""
    rows = [(FAMILIES[place % len(FAMILIES)], *case) for place, case in enumerate(cases)]
    return pytest.mark.parametrize(
        ("family", "name", "kind", "options"), rows, ids=lambda value: str(value).replace(" ", "")
    )


@each(COMPARISONS)
def test_a_student_that_is_the_teacher_has_nothing_to_learn_and_another_one_has(
    family: str, name: str, kind: str, options: dict[str, Any]
):
    teacher = model(kind, family, layers=3)
    twin, other = copy.deepcopy(teacher), model(kind, family, layers=3, seed=1)
    options = without_task(kind, options, name)
    batch = batch_of(kind)
    for stage in stages(name, between(kind, twin, teacher), **options):
        assert terms_of(stage, twin, teacher, batch)["loss"].item() == pytest.approx(0.0, abs=2e-6)
    for stage in stages(name, between(kind, other, teacher), **options):
        assert terms_of(stage, other, teacher, batch)["loss"].item() > 1e-3


# Each objective alone is checked with padding in objectives/test_invariants.py.
PADDED: list[tuple[str, str, dict[str, Any]]] = [
    ("od", "text", {"positions": "all"}),
    ("hs", "regression", {"match_norm": True}),
    ("hs", "classification", {"layer_map": "emd", "emd": {"attention": True}}),
    ("minilm", "classification", {}),
    ("minilmv2", "text", {"teacher_layer": -1, "relations": {"qk": 0.5, "vq": 1.0}}),
    ("minilmv2", "text", {"teacher_layer": -1, "direct": True, "relation_heads": 4}),
    ("tinybert", "classification", {}),
    ("distilbert", "text", {}),
]


@each(PADDED)
def test_padding_changes_no_term(family: str, name: str, kind: str, options: dict[str, Any]):
    teacher, student = model(kind, family, layers=4), model(kind, family, layers=2, seed=1)
    for stage in stages(name, between(kind, student, teacher), **options):
        values = []
        for width in (9, 24):
            # What a term learns from a batch must not reach the next one.
            fresh = copy.deepcopy(stage)
            values.append(terms_of(fresh, student, teacher, batch_of(kind, width)))
        for key, value in values[0].items():
            torch.testing.assert_close(values[1][key], value, rtol=2e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in NAMES for kind in tasks_of(registry.get(name))])
def test_the_gradient_reaches_the_student_and_every_bridge_but_never_the_teacher(name: str, kind: str):
    width = 32 if name == "distilbert" else 24
    teacher, student = model(kind, "bert", layers=4), model(kind, "bert", layers=2, hidden=width, seed=1)
    for stage in stages(name, between(kind, student, teacher)):
        student.zero_grad()
        terms_of(stage, student, teacher, batch_of(kind))["loss"].backward()
        assert all(parameter.grad is None for parameter in teacher.parameters())
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())
        for term in stage.terms:
            assert all(p.grad is not None and p.grad.abs().max() > 0 for p in term.objective.parameters())


# What is asked of the models.


@pytest.mark.parametrize("positions", ["masked", "all"])
def test_od_asks_for_predictions_only(positions: str):
    (stage,) = stages("od", context(), positions=positions)
    own = Request(logits=True, all_positions=positions == "all")
    assert request(stage) == (own, replace(own, temperatures=frozenset({1.0})))
    assert names(stage) == {"output": 1.0}
    assert names(stages("od", context(), weights={"output": 0.0, "mlm": 0.5})[0]) == {"mlm": 0.5}


def test_the_masked_lm_term_asks_nothing_of_the_teacher():
    (stage,) = stages("od", context(), weights={"output": 0.0, "mlm": 1.0})
    assert request(stage) == (Request(logits=True), Request())


def test_minilmv2_asks_for_three_projections_of_one_block_and_for_no_predictions():
    (stage,) = stages("minilmv2", context())
    assert request(stage) == (Request(matrices=projections(6)), Request(matrices=projections(11)))


def test_minilm_asks_for_the_projections_of_the_last_blocks():
    (stage,) = stages("minilm", context())
    assert request(stage) == (
        Request(matrices=projections(6), attention=frozenset({6})),
        Request(matrices=projections(12), attention=frozenset({12})),
    )
    (stage,) = stages("minilm", context(), weights={"attention": 0.0})
    assert request(stage) == (Request(matrices=projections(6, "v")), Request(matrices=projections(12, "v")))
    (stage,) = stages("minilm", context(), weights={"value": 0.0})
    assert request(stage)[1] == Request(matrices=projections(12, "qk"), attention=frozenset({12}))


def test_weights_of_zero_ask_for_nothing():
    (stage,) = stages("distilbert", context(), weights={"cosine": 0.0, "task": 0.0})
    own = Request(logits=True, all_positions=True)
    assert request(stage) == (own, replace(own, temperatures=frozenset({2.0})))
    (stage,) = stages("hs", context("classification"), weights={"prediction": 0.0})
    assert request(stage)[1] == Request(hidden=frozenset(range(2, 13, 2)))
    (stage,) = stages("tinybert", context(), weights={"attention": 0.0})
    assert request(stage)[1] == Request(hidden=frozenset(range(0, 13, 2)))
    (stage,) = stages("minilmv2", context(), relations={"kk": 0.0, "qq": 0.0})
    assert request(stage)[1] == Request(matrices=projections(11, "v"))
    (stage,) = stages("minilmv2", context(), relations={"kk": 0.0, "qq": 0.0}, direct=True)
    assert request(stage)[1] == Request(matrices=projections(11, "v"))


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("name", ["hs", "minilm", "minilmv2"])
def test_a_task_with_labels_adds_the_prediction_shared_between_teacher_and_gold(name: str, kind: str):
    (stage,) = stages(name, context(kind), alpha=0.25, weights={"prediction": 4.0})
    assert names(stage)["output"] == pytest.approx(1.0)
    assert names(stage)["task"] == pytest.approx(3.0)
    (stage,) = stages(name, context("text"))
    assert not {"output", "task", "mlm"} & set(names(stage))
    assert names(stages(name, context("text"), weights={"mlm": 0.5})[0])["mlm"] == 0.5


@pytest.mark.parametrize("name", ["kd", "dbkd", "distilbert", "makd", "hs", "minilm", "minilmv2", "od"])
def test_the_predictions_temperature_is_the_option(name: str):
    where = context("text" if name == "od" else "classification", student=shape(12))
    (stage,) = stages(name, where, temperature=2.5)
    (output,) = (term.objective for term in stage.terms if term.name == "output")
    assert output.temperature == 2.5 and output.scale


def test_kd_is_the_published_sum_of_both_shares():
    teacher, student = model("classification", "bert"), model("classification", "bert", layers=1, seed=1)
    batch = batch_of("classification")
    (stage,) = stages("kd", between("classification", student, teacher), alpha=0.3, temperature=2.0)
    found = terms_of(stage, student, teacher, batch)["loss"]
    mine, yours = (one(**model_inputs(one, batch)).logits for one in (student, teacher))
    p, q = torch.softmax(yours / 2, -1), torch.softmax(mine / 2, -1)
    soft = (p * (p.log() - q.log())).sum(-1).mean()
    gold = nn.functional.cross_entropy(mine, batch["labels"])
    torch.testing.assert_close(found, 0.3 * 4 * soft + 0.7 * gold)


def count_runs(modules: dict[str, nn.Module]) -> dict[str, int]:
    runs = dict.fromkeys(modules, 0)
    for name, module in modules.items():

        def count(*_: Any, name: str = name) -> None:
            runs[name] += 1

        module.register_forward_hook(count)
    return runs


@pytest.mark.parametrize("family", ["bert", "electra", "deberta-v2", "distilbert"])
def test_the_teachers_pass_ends_at_the_block_that_minilmv2_follows(family: str):
    teacher, student = model("text", family, layers=4), model("text", family, layers=2)
    (stage,) = stages("minilmv2", between("text", student, teacher))
    head = [module for name, module in teacher.named_modules() if name.rpartition(".")[2] in ("decoder", "predictions")]
    head += [getattr(teacher, name) for name in ("generator_lm_head", "vocab_projector") if hasattr(teacher, name)]
    assert head
    runs = count_runs(
        {
            "before": block_matrix(teacher, 2, "ffn_out").module,
            "wanted": block_matrix(teacher, 3, "query").module,
            "rest of the block": block_matrix(teacher, 3, "ffn_in").module,
            "after": blocks_of(teacher)[3],
            "head": head[0],
        }
    )
    with Capture(teacher, request(stage)[1], CLASSIFICATION) as capture, torch.no_grad():
        signals = capture.run(batch_of("text"))
    assert runs == {"before": 1, "wanted": 1, "rest of the block": 0, "after": 0, "head": 0}
    assert set(signals.matrices) == projections(3)


def test_one_pass_of_each_model_does_for_all_terms():
    teacher, student = model("classification", "bert", layers=4), model("classification", "bert", layers=2)
    (stage,) = stages("hs", between("classification", student, teacher), weights={"embedding": 1.0})
    runs = count_runs({"teacher": teacher.base_model, "student": student.base_model})
    terms_of(stage, student, teacher, batch_of("classification"))
    assert runs == {"teacher": 1, "student": 1}


# hs


@pytest.mark.parametrize("name", ["last", "uniform", "last-k", "uniform-consecutive", "uniform+last"])
def test_hs_follows_the_layer_map_that_is_named(name: str):
    (stage,) = stages("hs", context(), layer_map=name)
    objective = stage.terms[0].objective
    assert isinstance(objective, HiddenObjective)
    assert list(objective.pairs) == layer_map(name, 6, 12)
    assert request(stage)[1].hidden == {t for _, t in layer_map(name, 6, 12)}


def test_hs_takes_half_open_intervals_equal_depths_and_explicit_pairs():
    (stage,) = stages("hs", context(), layer_map="uniform-consecutive", consecutive="half-open")
    assert list(stage.terms[0].objective.pairs)[:2] == [(1, 1), (1, 2)]
    (stage,) = stages("hs", context(student=shape(12)), layer_map="all")
    assert list(stage.terms[0].objective.pairs) == [(i, i) for i in range(1, 13)]
    (stage,) = stages("hs", context(), layer_map=[[0, 0], [6, 11]])
    assert list(stage.terms[0].objective.pairs) == [(0, 0), (6, 11)]


def test_a_random_map_is_drawn_again_every_epoch_within_what_is_captured():
    (stage,) = stages("hs", context(), layer_map="random", seed=3)
    objective, seen = stage.terms[0].objective, set()
    assert request(stage)[1].hidden == set(range(1, 13))
    for epoch in range(5):
        objective.begin_epoch(epoch, 5)
        assert [s for s, _ in objective.pairs] == [1, 2, 3, 4, 5, 6]
        seen.add(objective.pairs)
    assert len(seen) == 5
    (other,) = stages("hs", context(), layer_map="random", seed=4)
    (same,) = stages("hs", context(), layer_map="random", seed=3)
    objective.begin_epoch(0, 5)
    assert same.terms[0].objective.pairs == objective.pairs != other.terms[0].objective.pairs


def test_the_transport_map_compares_all_blocks_of_both():
    (stage,) = stages("hs", context(), layer_map="emd")
    assert isinstance(stage.terms[0].objective, EMDObjective)
    assert request(stage)[0].hidden == set(range(1, 7))
    assert request(stage)[1].hidden == set(range(1, 13))
    assert not request(stage)[1].matrices
    (stage,) = stages("hs", context(student=shape(6, 384, 12)), layer_map="emd", emd={"attention": True})
    assert request(stage)[1].matrices == {(i, n) for i in range(1, 13) for n in ("query", "key")}


def test_bridges_come_where_widths_differ_or_where_they_are_asked_for():
    def sizes(student: ModelShape, **options: Any) -> list[tuple[int, ...]]:
        (stage,) = stages("hs", context(student=student), **options)
        return [tuple(p.shape) for term in stage.terms for p in term.objective.parameters()]

    assert sizes(shape(2)) == []
    assert sizes(shape(2), bridge=True) == [(768, 768)] * 2
    assert sizes(shape(2, 384), weights={"embedding": 1.0}) == [(768, 384)] * 3
    assert sizes(shape(2, 384), layer_map="last") == [(768, 384)]
    assert sizes(shape(2, 384), layer_map="emd") == [(768, 384), (768,)]


def test_the_transport_map_has_one_bridge_for_blocks_and_embeddings(tmp_path: Path):
    teacher, student = model("text", "bert", layers=3), model("text", "bert", layers=2, hidden=24, seed=1)
    (stage,) = stages("hs", between("text", student, teacher), layer_map="emd", weights={"embedding": 1.0})
    hidden, embedding = (list(term.objective.parameters()) for term in stage.terms)
    assert [p.shape for p in hidden] == [(32, 24), (32,)]
    assert [one is other for one, other in zip(hidden, embedding, strict=True)] == [True, True]
    step = Distiller(student, stage.terms, teacher=teacher, kind=MASKED_LM)
    found = step.train()(batch_of("text"))
    found["loss"].backward()
    assert all(bool(p.grad.any()) for p in hidden)
    # A checkpoint holds it once, and gives it back to both.
    save_weights(step, str(tmp_path / "model.safetensors"))
    before = [p.clone() for p in hidden]
    with torch.no_grad():
        for p in hidden:
            p.zero_()
    load_weights(step, tmp_path)
    step.close()
    assert all(map(torch.equal, before, embedding))


# minilm


def test_queries_against_keys_are_the_attention_of_the_last_block():
    teacher, student = model("text", "bert", layers=3), model("text", "bert", layers=2, hidden=24, seed=1)
    batch = batch_of("text")
    (stage,) = stages("minilm", between("text", student, teacher))
    found = terms_of(stage, student, teacher, batch)
    attention = AttentionObjective([(2, 3)])
    with (
        Capture(student, attention.student_request(), CLASSIFICATION) as a,
        Capture(teacher, attention.teacher_request(), CLASSIFICATION) as b,
    ):
        expected = attention(a.run(batch), b.run(batch), batch)
    torch.testing.assert_close(found["attention"], expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["loss"].detach(), found["attention"] + found["value"])


# minilmv2


@pytest.mark.parametrize(
    ("teacher", "student", "heads"),
    [
        (768, 768, 48),
        (768, 384, 48),
        (768, 576, 48),
        (768, 312, 24),
        (1024, 1024, 64),
        (1024, 384, 64),
        (1024, 768, 64),
        (384, 384, 48),
        (384, 312, 24),
        (32, 24, 8),
        (769, 768, 1),
    ],
)
def test_relation_heads_divide_both_widths_and_are_as_published_where_that_works(
    teacher: int, student: int, heads: int
):
    where = context(student=shape(6, student), teacher=shape(12, teacher))
    assert relation_heads(MiniLMv2Options(), where) == heads
    (stage,) = stages("minilmv2", where)
    assert stage.terms[0].objective.heads == heads


def test_a_teacher_of_one_block_is_followed_there():
    [stage] = stages("minilmv2", context(student=shape(1), teacher=shape(1)))
    assert request(stage)[1].matrices == projections(1)


def test_the_teachers_block_counts_from_either_end():
    def layer(number: int) -> int:
        (stage,) = stages("minilmv2", context(), teacher_layer=number)
        ((block, _),) = {(b, "") for b, _ in request(stage)[1].matrices}
        return block

    assert [layer(n) for n in (1, 10, 12, -1, -2, -12)] == [1, 10, 12, 12, 11, 1]


def test_cross_relations_stand_beside_those_of_their_own():
    (stage,) = stages("minilmv2", context(), relations={"qk": 0.5, "vv": 2.0, "kk": 0.0})
    assert stage.terms[0].objective.relations == {
        ("query", "query"): 1.0,
        ("value", "value"): 2.0,
        ("query", "key"): 0.5,
    }


@pytest.mark.parametrize("direct", [False, True])
def test_models_of_any_width_and_head_count_can_follow_each_other(direct: bool):
    batch, values = batch_of("text"), []
    teacher = model("text", "bert", layers=3, hidden=48)
    for heads in (1, 2, 8):
        # A single block's projections do not depend on its heads, so its relations must not either.
        student = model("text", "bert", layers=1, num_attention_heads=heads, seed=1)
        torch.manual_seed(0)
        (stage,) = stages("minilmv2", between("text", student, teacher), direct=direct)
        assert stage.terms[0].objective.heads == 16
        values.append(terms_of(stage, student, teacher, batch)["loss"].detach())
    assert values[0] > 0.1
    torch.testing.assert_close(values[1:], [values[0]] * 2)


def test_the_direct_variant_weighs_projections_and_has_maps_of_its_own():
    (stage,) = stages(
        "minilmv2",
        context(student=shape(6, 384)),
        direct=True,
        relations={"qq": 0.5, "kk": 0.0},
        relation_heads=12,
    )
    objective = stage.terms[0].objective
    assert objective.names == {"query": 0.5, "value": 1.0}
    assert {tuple(p.shape) for p in objective.parameters()} == {(12, 32, 64)}


# tinybert


def test_tinybert_follows_every_third_block_and_sums_over_blocks():
    (stage,) = stages("tinybert", context(student=shape(4, 312)))
    attention, hidden = (term.objective for term in stage.terms)
    assert list(attention.pairs) == [(1, 3), (2, 6), (3, 9), (4, 12)]
    assert list(hidden.pairs) == [(0, 0), (1, 3), (2, 6), (3, 9), (4, 12)]
    assert names(stage) == {"attention": 4.0, "hidden": 5.0}
    assert [tuple(p.shape) for p in hidden.parameters()] == [(768, 312), (768,)]


def test_tinyberts_hidden_term_is_the_published_sum_through_one_bridge():
    teacher, student = model("text", "bert", layers=4), model("text", "bert", layers=2, hidden=24, seed=1)
    batch = batch_of("text")
    (stage,) = stages("tinybert", between("text", student, teacher), weights={"attention": 0.0})
    bridge = stage.terms[0].objective.bridges["shared"]
    found = terms_of(stage, student, teacher, batch)["loss"]
    both = Request(hidden=frozenset({0, 1, 2})), Request(hidden=frozenset({0, 2, 4}))
    with Capture(student, both[0], CLASSIFICATION) as a, Capture(teacher, both[1], CLASSIFICATION) as b:
        own, other = a.run(batch).hidden, b.run(batch).hidden
    mask = batch["attention_mask"]
    expected = sum(token_mse(bridge(own[m]), other[2 * m], mask) for m in range(3))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_tinybert_learns_the_inside_first_and_then_only_the_prediction():
    first, second = stages("tinybert", context("classification"))
    assert not request(first)[0].logits
    assert not request(first)[1].logits
    assert names(second) == {"output": 1.0}
    assert request(second) == (Request(logits=True), Request(logits=True, temperatures=frozenset({1.0})))
    assert first.share + second.share == pytest.approx(1.0)
    assert (first.learning_rate, second.learning_rate) == (None, 3e-5)
    assert second.terms[0].objective.temperature == 1.0


def test_tinyberts_regression_learns_from_gold_labels_and_asks_no_teacher():
    _, second = stages("tinybert", context("regression"))
    assert names(second) == {"task": 1.0}
    assert request(second)[1] == Request()
    _, second = stages("tinybert", context("regression"), alpha=0.5)
    assert names(second) == {"output": 0.5, "task": 0.5}


def test_tinybert_on_plain_text_is_the_first_stage_alone():
    (stage,) = stages("tinybert", context("text"))
    assert (stage.name, stage.share, stage.learning_rate) == ("general", 1.0, None)
    assert not request(stage)[0].logits


# distilbert


@pytest.mark.parametrize(("kind", "task"), [("text", "mlm"), ("classification", "task"), ("regression", "task")])
def test_distilbert_weighs_its_three_terms_five_to_two_to_one(kind: str, task: str):
    (stage,) = stages("distilbert", context(kind))
    assert names(stage) == {"output": 5.0, task: 2.0, "cosine": 1.0}
    assert request(stage)[1].hidden == {12}
    assert request(stage)[0].hidden == {6}
    assert stage.terms[0].objective.temperature == 2.0


def test_distilbert_compares_predictions_at_all_words_or_at_masked_ones():
    assert request(stages("distilbert", context())[0])[1].all_positions
    (stage,) = stages("distilbert", context(), positions="masked")
    assert not request(stage)[1].all_positions


# What cannot work


WRONG: list[tuple[str, Context, dict[str, Any], str, str]] = [
    ("od", context(student=shape(vocab=28996)), {}, "28,996", "tokenizer"),
    ("od", context(), {"weights": {"output": 0.0}}, "weight 0", ""),
    ("distilbert", context(student=shape(vocab=28996)), {}, "vocabulary", "tokenizer"),
    ("distilbert", context(student=shape(6, 384)), {}, "384", "use 768"),
    ("distilbert", context("classification"), {"positions": "masked"}, "without masked tokens", "leave it out"),
    ("hs", context(), {"layer_map": "all"}, "equal depths", "uniform"),
    ("hs", context(student=shape(24)), {"layer_map": "last-k"}, "no deeper", "student.layers = 12"),
    ("hs", context(), {"layer_map": [[0, 0]]}, "above 0", "block 6"),
    ("hs", context(), {"layer_map": [[7, 12]]}, "[7, 12]", "did you mean [6, 12]?"),
    ("hs", context(), {"layer_map": [[1, 2, 3]]}, "pair", "[[6, 12]]"),
    ("hs", context(), {"layer_map": []}, "at least one", "[[6, 12]]"),
    ("hs", context(), {"layer_map": "emd", "emd": {"separate": True}}, "without attention", "emd.attention = true"),
    ("hs", context(), {"layer_map": [[4, 12]]}, "above 4", "block 6"),
    ("hs", context(student=shape(6, 384)), {"bridge": False}, "bridge", "leave it out"),
    ("hs", context(), {"consecutive": "half-open"}, "consecutive", "uniform-consecutive"),
    ("hs", context(), {"seed": 3}, "seed", "random"),
    ("hs", context(), {"emd": {"attention": True}}, "emd", "emd"),
    ("hs", context(), {"layer_map": "emd", "match_norm": True}, "match_norm", ""),
    (
        "hs",
        context(student=shape(6, 512, 8)),
        {"layer_map": "emd", "emd": {"attention": True}},
        "12 of the teacher and 8",
        "leave attention out",
    ),
    ("hs", context(), {"alpha": 0.5}, "masked text", "leave it out"),
    ("hs", context("classification"), {"weights": {"mlm": 1.0}}, "without masked tokens", "leave it out"),
    ("hs", context(), {"weights": {"hidden": 0.0}}, "weight 0", ""),
    ("minilm", context(student=shape(6, 384, 6)), {}, "12 of the teacher and 6", "student.heads = 12"),
    ("minilm", context(student=shape(6, 320, 5)), {}, "heads", "student.hidden_size = 324 and student.heads = 12"),
    ("minilm", context(student=shape(6, 384, 6), form="checkpoint"), {}, "heads", "a student with 12 heads"),
    ("minilmv2", context(student=shape(6, 312)), {"relation_heads": 48}, "both 768 and 312", "use 24"),
    ("minilmv2", context(), {"relation_heads": 50}, "a width of 768", "use 48"),
    ("minilmv2", context(), {"teacher_layer": 13}, "no block 13", "1 to 12"),
    ("minilmv2", context(), {"teacher_layer": 0}, "no block 0", "1 to 12"),
    ("minilmv2", context(), {"teacher_layer": -13}, "no block -13", "-12"),
    ("minilmv2", context(), {"relations": {"qq": 0, "kk": 0, "vv": 0}}, "relations", ""),
    ("minilmv2", context(), {"direct": True, "relations": {"qk": 1.0}}, "no qk", "qq, kk and vv"),
    ("minilmv2", context(), {"temperature": 2.0}, "masked text", "leave it out"),
    ("tinybert", context(student=shape(5)), {}, "12 blocks cannot be divided among 5", "use 4 blocks"),
    ("tinybert", context(student=shape(4, 312, 6)), {}, "heads", "student.heads = 12"),
    ("tinybert", context(student=shape(4, 312)), {"bridge": False}, "bridge", "as wide"),
    ("tinybert", context("classification"), {"shares": [0.5, 0.2]}, "add up to 1", "use [0.714, 0.286]"),
    ("minilmv2", context(student=shape(1), teacher=shape(1)), {"teacher_layer": -2}, "no block -2", "use 1"),
    ("makd", context("classification"), {"shares": [0.2, 0.3, 0.5]}, "shares has no effect", '"staged"'),
    ("makd", context("classification"), {"final_learning_rate": 1e-5}, "no effect", '"staged"'),
    (
        "makd",
        context("classification"),
        {"schedule": "staged", "shares": [0.4, 0.4, 0.4]},
        "add up to 1",
        "use [0.333, 0.333, 0.333]",
    ),
    ("makd", context("classification", student=shape(6, 768, 8)), {}, "12 of the teacher and 8", "student.heads = 12"),
    ("theseus", context("classification"), {"full_at": 0.5, "k": 1e-3}, "full_at has no effect", "one of them"),
    (
        "theseus",
        context("classification"),
        {"schedule": "constant", "full_at": 0.5, "steps_for_replacing": 10},
        "full_at has no effect",
        "one of them",
    ),
    ("tinybert", context(), {"shares": [0.5, 0.5]}, "masked text", "leave it out"),
    ("tinybert", context(), {"weights": {"attention": 0.0, "hidden": 0.0}}, "weight 0", ""),
]


@pytest.mark.parametrize(("name", "where", "options", "message", "hint"), WRONG, ids=lambda v: str(v)[:40])
def test_what_cannot_work_is_refused_with_the_way_out(
    name: str, where: Context, options: dict[str, Any], message: str, hint: str
):
    with pytest.raises(InputError) as caught:
        stages(name, where, **options)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")
    assert (caught.value.where or "method.").split(".")[0] in ("method", "student")


def test_the_nearest_setting_of_a_hint_works():
    for student in (shape(4, 324, 12), shape(4, 312, 12)):
        assert stages("minilm", context(student=student))
        assert stages("tinybert", context(student=student))
    assert stages("minilmv2", context(student=shape(6, 312)), relation_heads=24)
    assert stages("tinybert", context(student=shape(4, 384, 8)), weights={"attention": 0.0})


@pytest.mark.parametrize("name", NAMES)
def test_options_refuse_unknown_keys_and_wrong_types(name: str):
    options = registry.get(name).options
    for wrong in ({"wieghts": {}}, {"weights": {"unknown": 1.0}}, {"weights": {"hidden": -1.0}}, {"weights": 1.0}):
        with pytest.raises(ValidationError):
            options.model_validate(wrong)
    with pytest.raises(ValidationError):
        options.model_validate({"temperature": 0.0})


def test_a_misspelt_layer_map_gets_the_nearest_name():
    with pytest.raises(ValidationError, match="did you mean 'uniform\\+last'"):
        registry.get("hs").options.model_validate({"layer_map": "uniform-last"})


# What everybody sees


def test_defaults_are_the_published_ones():
    assert registry.get("od").options().positions == "masked"
    assert registry.get("hs").options().consecutive == "closed"
    two = registry.get("minilmv2").options()
    assert (two.teacher_layer, two.direct) == (-2, False)
    assert [n for n, weight in two.relations.model_dump().items() if weight] == ["qq", "kk", "vv"]
    assert registry.get("tinybert").train["learning_rate"] == 5e-5
    epochs = [registry.get("tinybert").train["epochs"] * share for share in registry.get("tinybert").options().shares]
    assert [round(n, 1) for n in epochs] == [10.0, 3.0]
    rates = {
        name: registry.get(name).text_train.get("learning_rate") for name in ("minilmv2", "distilbert", "tinybert")
    }
    assert rates == {"minilmv2": 6e-4, "distilbert": 5e-4, "tinybert": None}
    train = registry.get("distilbert").train
    assert (train["epochs"], train["warmup"], train["weight_decay"]) == (3.0, 0.05, 0.0)


ON_TEXT = """
task = {{name = "notes", type = "text", data = "notes.txt"}}
method = "{method}"
[teacher]
model = "teacher"
[train]
{train}
"""


@pytest.mark.parametrize(
    ("method", "train", "expected"),
    [
        ("distilbert", "", ((0.9, 0.98), 1e-6, 5.0)),
        ("minilmv2", "", ((0.9, 0.999), 1e-6, 1.0)),
        ("od", "", ((0.9, 0.999), 1e-8, 1.0)),
        ("distilbert", "betas = [0.8, 0.9]\nepsilon = 1e-7\nmax_grad_norm = 2", ((0.8, 0.9), 1e-7, 2.0)),
    ],
)
def test_the_optimizer_on_plain_text_is_the_published_one_unless_the_recipe_says_otherwise(
    tmp_path: Path, method: str, train: str, expected: tuple
):
    path = tmp_path / "recipe.toml"
    path.write_text(ON_TEXT.format(method=method, train=train), encoding="utf-8")
    loop = resolve(load_recipe(path), path).loop
    assert (tuple(loop.betas), loop.epsilon, loop.max_grad_norm) == expected


@pytest.mark.parametrize("name", NAMES)
def test_every_method_says_what_it_is_and_whose(name: str):
    method = registry.get(name)
    assert name in registry.names()
    assert method.name == name
    assert all((method.title, method.formula, method.signals, method.constraints, method.cost))
    assert re.search(r"\(20\d\d\): .+ arXiv \d{4}\.\d{5}", method.paper)
    StudentSection.model_validate(method.student)


def test_a_citation_is_shortened_to_first_author_and_year():
    assert short_citation(registry.get("distilbert").paper) == "Sanh et al. 2019"
    assert short_citation("Somebody (2020): A Title. arXiv 2001.00001") == "Somebody 2020"
    assert short_citation("a page of our own") == "a page of our own"


@pytest.mark.parametrize("name", NAMES)
def test_a_methods_page_shows_every_option_as_a_recipe_writes_it(name: str, capsys: pytest.CaptureFixture[str]):
    methods_command(name, False)
    shown = capsys.readouterr().out
    method = registry.get(name)
    assert re.sub(r"\W", "", method.formula)[:20] in re.sub(r"\W", "", shown)
    assert method.paper.split("arXiv ")[1][:10] in shown
    for key, value in method.options().model_dump().items():
        assert f"method.{key}" in shown
        if isinstance(value, dict):
            assert all(f"method.{key}.{inner}" in shown for inner in value)
    assert "{'" not in shown
    assert "None" not in shown
    assert "True" not in shown


# What is handed over


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hs", {"weights": {"embedding": 1.0}}),
        ("hs", {"layer_map": "emd"}),
        ("minilmv2", {"direct": True, "relation_heads": 4}),
        ("tinybert", {}),
    ],
    ids=str,
)
def test_bridges_learn_with_the_student_and_stay_behind(name: str, options: dict[str, Any], tmp_path: Path):
    teacher = model("classification", "bert", layers=4)
    section = StudentSection(form="width", hidden_size=24, heads=4, layers=2)
    student = build_student(teacher, section, seed=0).model
    keys, count = set(student.state_dict()), count_parameters(student)
    stage = stages(name, between("classification", student, teacher), **options)[0]
    distiller = Distiller(student, stage.terms, teacher=teacher, kind=CLASSIFICATION)
    distiller.train()
    bridges = {n: p for n, p in distiller.named_parameters() if n.startswith("objectives.")}
    before = {n: p.detach().clone() for n, p in bridges.items()}
    assert bridges
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = distiller(batch_of("classification"))["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    distiller.close()
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[n]) for n, p in bridges.items())
    assert set(student.state_dict()) == keys
    assert count_parameters(student) == count
    save_model(student, tmp_path)
    assert set(load_model(str(tmp_path)).state_dict()) == keys


@pytest.mark.parametrize("gated", [True, False])
def test_makd_compares_the_gates_of_two_gated_models(gated: bool):
    teacher, student = replace(shape(), gated=True), replace(shape(6), gated=gated)
    (stage, *_) = stages("makd", context("classification", student=student, teacher=teacher), schedule="joint")
    names = {name for _, name in request(stage)[0].matrices}
    assert ("ffn_gate" in names) == gated and {"ffn_in", "ffn_out", "query"} <= names
