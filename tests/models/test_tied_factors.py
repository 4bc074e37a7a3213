"""A factored table of word embeddings, and the masked-LM head that shares it."""

import copy
import json
from pathlib import Path

import pytest
import torch
from families import NAMES, tiny
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

from kdcli.errors import InputError
from kdcli.models.blocks import body_of
from kdcli.models.counts import count_parameters
from kdcli.models.families import family_of
from kdcli.models.heads import with_new_head
from kdcli.models.load import load_model
from kdcli.models.lowrank import LowRankDecoder, LowRankEmbedding, factorise, merge_low_rank
from kdcli.models.probe import probe, probe_batch
from kdcli.models.reinit import reinitialise
from kdcli.models.save import save_model
from kdcli.recipe.schema import StudentSection
from kdcli.tasks.classification import KIND as CLASSIFICATION
from kdcli.tasks.masked_lm import KIND as MASKED_LM

RANK = 6
FORMS = [*NAMES, "deberta-v2 legacy=False", "bert tie_word_embeddings=False"]


def table_of(model: PreTrainedModel) -> nn.Module:
    return body_of(model).get_submodule(family_of(model.config).word_embeddings)


def tables_of(model: PreTrainedModel) -> list[Tensor]:
    """The table, and the matrix of an output layer of its own."""
    table, output = table_of(model).weight, model.get_output_embeddings().weight
    return [table] if output is table or len(output) != len(table) else [table, output]


def language_model(form: str = "bert", seed: int = 0) -> PreTrainedModel:
    """A random masked language model whose table is of rank RANK, so that factors lose nothing."""
    family, *extra = form.split()
    settings = {name: value == "True" for name, value in (setting.split("=") for setting in extra)}
    config = tiny(family, seed=seed, **settings).config
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForMaskedLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        table = table_of(model)
        rows, width = table.weight.shape
        for weight in tables_of(model):
            weight.copy_(torch.randn(rows, RANK) @ torch.randn(RANK, width) / RANK**0.5)
    return model


def factored(teacher: PreTrainedModel, rank: int = RANK) -> PreTrainedModel:
    student = copy.deepcopy(teacher)
    factorise(student, StudentSection(form="low-rank", budget=1.0, embedding_rank=rank))
    return student


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_the_head_shares_the_factors(form: str):
    teacher = language_model(form)
    student = factored(teacher)
    rows, width = table_of(teacher).weight.shape
    # A head with a matrix of its own has factors of its own.
    fewer = len(tables_of(teacher)) * (rows * width - RANK * (rows + width))
    assert count_parameters(teacher) - count_parameters(student) == fewer
    close(probe(student), probe(teacher))


@pytest.mark.parametrize("form", FORMS)
def test_both_uses_of_the_factors_reach_them(form: str):
    student = factored(language_model(form), RANK - 2)
    merged = merge_low_rank(copy.deepcopy(student))
    for model in (student, merged):
        model(**probe_batch(student)).logits.square().mean().backward()
    table, dense = table_of(student), table_of(merged)  # type: ignore[arg-type]
    assert isinstance(table, LowRankEmbedding) and isinstance(dense, nn.Embedding) and dense.weight.grad is not None
    # The chain rule of E = E1 E2, where E is the plain table that the plain head shares.
    close(table.down.weight.grad, dense.weight.grad @ table.up.weight)  # type: ignore[arg-type]
    close(table.up.weight.grad, dense.weight.grad.T @ table.down.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FORMS)
def test_it_is_saved_loaded_and_merged(form: str, tmp_path: Path):
    teacher = language_model(form)
    student = factored(teacher, RANK - 2)
    logits = probe(student)
    for name in ("student", "merged"):
        (tmp_path / name).mkdir()
    save_model(student, tmp_path / "student")
    size = (tmp_path / "student" / "model.safetensors").stat().st_size
    assert size < 4 * count_parameters(student) + 20_000
    loaded = [
        load_model(tmp_path / "student", MASKED_LM.head),
        AutoModelForMaskedLM.from_pretrained(tmp_path / "student"),
    ]
    for model in loaded:
        assert torch.equal(probe(model), logits) and count_parameters(model) == count_parameters(student)
    merged = merge_low_rank(loaded[0])
    close(probe(merged), logits)  # type: ignore[arg-type]
    assert list(merged.state_dict()) == list(teacher.state_dict())
    assert count_parameters(merged) == count_parameters(teacher)
    save_model(merged, tmp_path / "merged")  # type: ignore[arg-type]
    assert "kdcli" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert torch.equal(probe(AutoModelForMaskedLM.from_pretrained(tmp_path / "merged")), probe(merged))  # type: ignore[arg-type]


def test_a_copy_shares_its_own_factors_and_fresh_weights_stay_shared():
    student = factored(language_model())
    other = copy.deepcopy(student)
    decoder = other.get_submodule("cls.predictions.decoder")
    assert isinstance(decoder, LowRankDecoder) and decoder.table is table_of(other)
    reinitialise(other)
    before = probe(student)
    with torch.no_grad():
        table_of(other).up.weight.zero_()  # type: ignore[union-attr, operator]
    assert torch.equal(probe(student), before)
    assert torch.equal(probe(other), decoder.bias.expand_as(probe(other)))  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_a_new_head_on_a_body_of_factors_shares_them(family: str):
    body = factored(language_model(family)).base_model
    model = with_new_head(body, MASKED_LM.head)
    assert sum(isinstance(module, LowRankDecoder) for module in model.modules()) == 1
    rows, width = table_of(model).num_embeddings, table_of(model).embedding_dim
    assert not any(tuple(parameter.shape) == (rows, width) for parameter in model.parameters())
    # A classifier has no tokens to predict, and a plain body shares its plain table.
    assert not any(isinstance(m, LowRankDecoder) for m in with_new_head(body, CLASSIFICATION.head).modules())
    plain = with_new_head(language_model(family).base_model, MASKED_LM.head)
    assert plain.get_output_embeddings().weight is table_of(plain).weight


def test_folders_of_earlier_versions_keep_their_own_matrix(tmp_path: Path):
    teacher = language_model()
    student = factored(teacher)
    head = student.get_submodule("cls.predictions")
    plain = nn.Linear(32, 220)
    with torch.no_grad():
        plain.weight.mul_(3.0)
    plain.bias = head.bias  # type: ignore[assignment]
    head.decoder = plain
    save_model(student, tmp_path)
    assert "low_rank_decoders" not in json.loads((tmp_path / "config.json").read_text())["kdcli"]
    assert torch.equal(probe(load_model(tmp_path, MASKED_LM.head)), probe(student))


@pytest.mark.parametrize("source", ["cls.predictions.transform.dense", "bert.nothing", 3])
def test_a_head_tied_to_something_else_is_refused(source: object, tmp_path: Path):
    save_model(factored(language_model()), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["kdcli"]["low_rank_decoders"] = {"cls.predictions.decoder": source}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="cannot be restored"):
        load_model(tmp_path, MASKED_LM.head)


def test_the_table_keeps_its_padding_row_apart():
    student = factored(language_model())
    table = table_of(student)
    assert isinstance(table, LowRankEmbedding) and table.padding_idx == AutoConfig.for_model("bert").pad_token_id
