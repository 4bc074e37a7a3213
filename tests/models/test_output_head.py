"""A decoder's logits as what they are formed from are those of the model itself, whatever its head is made of."""

from typing import Any

import families
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from kdcli.models.capture import Capture
from kdcli.models.lowrank import LowRankLinear, factorise
from kdcli.models.overparam import overparameterise
from kdcli.objectives.distribution import Categorical
from kdcli.recipe.schema import OverparamSection, StudentSection
from kdcli.signals import Logits, Request, VocabularyLogits
from kdcli.tasks.causal_lm import KIND
from kdcli.tasks.next_tokens import NextTokenCollator

ROWS = [[5, 9, 13, 21, 8], [7, 30, 44, 12, 99, 3, 60, 2], [11, 4]]


def batch() -> dict[str, Tensor]:
    tokenizer = families.tokenizer()
    rows = [{"index": i, "input_ids": ids, "attention_mask": [1] * len(ids)} for i, ids in enumerate(ROWS)]
    return NextTokenCollator(tokenizer)(rows)


def captured(model: PreTrainedModel, inputs: dict[str, Tensor], **request: Any) -> Logits:
    capture = Capture(model, Request(logits=True, **request), KIND)
    with capture as running:
        (table,) = running.run(inputs).predictions
    capture.close()
    return table.logits


def plain(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Return the model's own logits at the predicted positions."""
    output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    return output.logits.flatten(0, 1)[inputs["predicted_positions"]]


def gradients(model: PreTrainedModel, logits: Logits, target: Tensor) -> list[Tensor]:
    model.zero_grad()
    Categorical().nll(logits, target).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def compare(model: PreTrainedModel, **request: Any) -> VocabularyLogits:
    """Compare logits, and the gradients of a loss on them, with the model's own."""
    inputs = batch()
    found = captured(model, inputs, **request)
    assert isinstance(found, VocabularyLogits)
    torch.testing.assert_close(found.float(), plain(model, inputs), rtol=1e-4, atol=1e-5)
    own, expected = (gradients(model, logits, inputs["targets"]) for logits in (found, plain(model, inputs)))
    assert len(own) == len(expected)
    for one, other in zip(own, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    return found


@pytest.mark.parametrize("family", families.DECODERS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_decoder(family: str, tied: bool):
    extra = {"final_logit_softcapping": 1.5} if "gemma" in family else {}
    found = compare(families.tiny(family, tie_word_embeddings=tied, **extra))
    assert found.cap == extra.get("final_logit_softcapping")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_factors_are_never_multiplied(tied: bool):
    """Of a head A B the states are B x, and A is the weight."""
    model = families.tiny("llama", tie_word_embeddings=tied)
    if tied:
        factorise(model, StudentSection(form="low-rank", rank=4, embedding_rank=6))
    else:
        model.lm_head = LowRankLinear.from_linear(model.lm_head, 6)
    found = compare(model)
    assert found.weight.shape == (model.config.vocab_size, 6) and found.states.shape[1] == 6


def test_blocks_of_chains():
    model = families.tiny("llama")
    overparameterise(model, OverparamSection())
    compare(model)


def test_all_positions_are_asked_for():
    inputs = batch()
    found = captured(families.tiny("llama"), inputs, all_positions=True)
    assert len(found) == sum(map(len, ROWS)) and len(inputs["targets"]) == len(found) - len(ROWS)


def test_products_follow_the_precision_of_the_pass():
    model, inputs = families.tiny("llama"), batch()
    with torch.autocast("cpu", torch.bfloat16):
        found = captured(model, inputs)
        expected = plain(model, inputs)
    assert isinstance(found, VocabularyLogits) and found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=0.02 * expected.abs().max().item())
    own = gradients(model, found, inputs["targets"])
    assert all(gradient.dtype == torch.float32 for gradient in own)


class Scaled(LlamaForCausalLM):
    """A decoder that does something to its logits that its configuration does not say."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 3.0
        return output


def test_logits_of_an_unknown_form_are_those_of_the_model():
    model, inputs = Scaled(families.tiny("llama").config).eval(), batch()
    found = captured(model, inputs)
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, plain(model, inputs))


def test_what_is_differentiated_by_inputs_is_a_table():
    assert isinstance(captured(families.tiny("llama"), batch(), gradients=1, hidden=frozenset({0})), Tensor)
