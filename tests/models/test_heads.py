"""A general model becomes a classifier, or starts again from random weights; of every family."""

import copy

import pytest
import torch
from families import NAMES, tiny
from transformers import AutoModel, AutoModelForMaskedLM

from kdcli.models.blocks import block_matrix
from kdcli.models.classes import reorder_classes
from kdcli.models.heads import head_of, with_new_head
from kdcli.models.lowrank import LowRankLinear
from kdcli.models.probe import probe
from kdcli.models.reinit import reinitialise
from kdcli.models.student import build_student
from kdcli.recipe.schema import StudentSection
from kdcli.tasks.classification import KIND as LABELS
from kdcli.tasks.heads import heads
from kdcli.tasks.masked_lm import MASKED_LM
from kdcli.tasks.text_inputs import SEQUENCE_CLASSIFICATION as CLASSIFIER

IDS = torch.arange(5, 17)[None]


def body(family: str):
    return AutoModel.from_config(tiny(family).config).eval()


def masked_lm(family: str):
    torch.manual_seed(3)
    return AutoModelForMaskedLM.from_config(tiny(family).config).eval()


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("make", [body, masked_lm])
def test_the_classifiers_body_is_a_copy(family: str, make):
    model = make(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classifier = with_new_head(model, CLASSIFIER, LABELS.configure(["a", "b", "c"]))
    assert head_of(classifier, heads()) == CLASSIFIER and classifier.config.id2label[2] == "c"
    with torch.no_grad():
        expected = model.base_model(IDS).last_hidden_state
        assert torch.equal(classifier.base_model(IDS).last_hidden_state, expected)
        assert classifier(IDS).logits.shape == (1, 3)
        for parameter in classifier.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("form", ["dense", "low-rank"])
def test_a_new_language_models_head_stands_on_any_body(family: str, form: str):
    model = body(family)
    if form == "low-rank":
        model = build_student(model, StudentSection(form="low-rank", rank=4, embedding_rank=4), seed=0).model
    headed = with_new_head(model, MASKED_LM)
    assert head_of(headed, heads()) == MASKED_LM
    with torch.no_grad():
        assert torch.equal(headed.base_model(IDS).last_hidden_state, model(IDS).last_hidden_state)
        assert headed(IDS).logits.shape == (1, 12, 220)
    table = headed.get_input_embeddings().weight
    assert (headed.get_output_embeddings().weight is table) == (form == "dense")


@pytest.mark.parametrize("family", NAMES)
def test_nothing_of_the_old_weights_is_left(family: str):
    model = tiny(family)
    old = {name: value.clone() for name, value in model.named_parameters()}
    torch.manual_seed(1)
    reinitialise(model)
    for name, value in model.named_parameters():
        assert value.isfinite().all()
        if value.ndim > 1:
            assert not torch.equal(value, old[name]), name
            # The usual initialisation, not that of the tiny models of these tests, which is four times as large.
            assert value.std() < 0.6 * old[name].std(), name
    again = copy.deepcopy(model)
    torch.manual_seed(1)
    reinitialise(again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_family_that_starts_its_output_maps_smaller_does_so_again():
    model = tiny("modernbert", hidden=64)
    reinitialise(model)
    spread = {name: block_matrix(model, 1, name).weight.std() for name in ("query", "attention_output")}
    # Its output maps have a standard deviation that is smaller by sqrt(2 L).
    assert 0.4 < spread["attention_output"] / spread["query"] < 0.6


def test_random_factors_multiply_to_a_matrix_of_the_usual_size():
    section = StudentSection(form="low-rank", budget=0.5, embedding_rank=8)
    student = build_student(tiny("bert", hidden=64), section, seed=0).model
    torch.manual_seed(0)
    reinitialise(student)
    found = [module for module in student.modules() if isinstance(module, LowRankLinear)]
    assert len(found) == 12
    for module in found:
        product = module.up.weight @ module.down.weight
        # The best approximation of a random matrix at half of its weights keeps most of its size.
        assert 0.5 < product.std() / student.config.initializer_range < 1.0
    assert student(IDS).logits.isfinite().all()


def test_a_layer_before_the_classifier_that_is_as_wide_keeps_its_order():
    model = tiny("distilbert", labels=32)
    assert model.pre_classifier.out_features == model.config.num_labels
    before, order = probe(model), torch.randperm(32, generator=torch.Generator().manual_seed(0)).tolist()
    reorder_classes(model, order)
    torch.testing.assert_close(probe(model), before[:, order], rtol=0, atol=0)
