"""Width students whose weights are projections of the teacher's: what they compute, train and merge to."""

import copy
from typing import Any

import pytest
import torch
from families import NAMES, tiny
from torch import Tensor
from transformers import AutoConfig, AutoModelForMaskedLM

from kdcli.errors import InputError
from kdcli.models.blocks import block_matrix, iter_block_matrices
from kdcli.models.counts import count_parameters
from kdcli.models.families import FAMILIES
from kdcli.models.probe import probe
from kdcli.models.projections import is_projected, moments_of, project, projections_of
from kdcli.models.student import StudentBuild, build_student
from kdcli.recipe.schema import OverparamSection, StudentSection
from kdcli.signals import EMBEDDINGS
from kdcli.tensors.projection import (
    Moment,
    ProjectedWeight,
    directions,
    fitted_norm,
    merge_projections,
    reading,
    selection,
)


def batches(count: int = 4, length: int = 24) -> list[dict[str, Tensor]]:
    """Return random texts, the last rows of each batch padded."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for _ in range(count):
        ids = torch.randint(5, 220, (8, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[5:, length // 2 :] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def projected(teacher: Any, **fields: Any) -> StudentBuild:
    """Return a student of projections of `teacher`, in eval mode."""
    build = build_student(teacher, StudentSection(form="width", init="projections", **fields), seed=0)
    assert build.teacher_layers is not None
    project(teacher, build.model, build.teacher_layers, moments_of(teacher, batches()))
    build.model.eval()
    return build


@pytest.mark.parametrize("family", NAMES)
def test_at_full_width_a_student_is_its_teacher_and_merging_changes_nothing(family: str):
    teacher = tiny(family)
    student = projected(teacher).model
    expected = probe(teacher)
    assert (probe(student) - expected).abs().max() < 1e-4
    assert merge_projections(student) > 0 and not is_projected(student)
    assert (probe(student) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("family", "heads"), [*((family, 3) for family in NAMES), ("bert", 4), ("deberta-v2", 4), ("modernbert", 4)]
)
def test_a_narrow_student_trains_its_projections_and_merges_to_a_plain_model(family: str, heads: int):
    teacher = tiny(family, layers=3)
    fields = {"hidden_size": 24, "heads": heads, "intermediate_size": 40, "layers": 2}
    student = projected(teacher, **fields).model
    sliced = build_student(teacher, StudentSection(form="width", init="teacher", **fields), seed=0).model
    before = copy.deepcopy(teacher.state_dict())
    batch = batches(1)[0]
    names = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    # Every matrix and the embeddings, or the map after them, are trained through projections alone.
    assert not any(name.endswith("query.weight") for name in names)
    student.train()
    student(**batch).logits.square().sum().backward()
    trained = [name for name in names if ".parametrizations." in name]
    silent = [name for name in trained if names[name].grad is None or not names[name].grad.abs().sum() > 0]
    # A repeated block's last output is all that is read of it, so that nothing is left out there either.
    assert trained and not silent
    with torch.no_grad():
        for parameter in names.values():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad / parameter.grad.norm().clamp(min=1e-6)
    after = probe(student)
    merge_projections(student)
    assert (probe(student) - after).abs().max() < 1e-4
    assert {k: v.shape for k, v in student.state_dict().items()} == {k: v.shape for k, v in sliced.state_dict().items()}
    assert count_parameters(student) == count_parameters(sliced)
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())


def test_the_start_is_nearer_to_the_teacher_than_slices():
    teacher = tiny("bert", layers=3, hidden=48)
    # Real hidden states have few directions; random weights give them all.
    basis = torch.linalg.qr(torch.randn(48, 12, generator=torch.Generator().manual_seed(0)))[0]
    with torch.no_grad():
        for table in teacher.bert.embeddings.modules():
            if isinstance(table, torch.nn.Embedding):
                table.weight.copy_(table.weight @ basis @ basis.T)
        for key, matrix in iter_block_matrices(teacher):
            if key[1] in ("attention_output", "ffn_out"):
                matrix.weight.copy_(basis @ basis.T @ matrix.weight)
    fields = {"hidden_size": 24, "heads": 2}
    ours = projected(teacher, **fields).model
    sliced = build_student(teacher, StudentSection(form="width", **fields), seed=0).model
    errors = []
    for student in (ours, sliced.eval()):
        with torch.no_grad():
            pairs = [(student(**batch).logits, teacher(**batch).logits) for batch in batches()]
        errors.append(sum(float((a - b).square().sum()) for a, b in pairs))
    print(errors)
    assert errors[0] < 0.7 * errors[1]


def spaces_of(student: Any, layer: int) -> dict[str, Tensor]:
    """Return what stands between a teacher's vectors and those of a block of its student, by who gives them."""
    keys = [(layer, name) for name in FAMILIES[student.config.model_type].matrices]
    return {name: side.detach().double() for (_, name), side in projections_of(student, keys).items()}


def test_a_narrow_head_keeps_the_size_of_its_scores():
    teacher = tiny("bert", hidden=48)
    generator = torch.Generator().manual_seed(0)

    def basis(width: int, count: int) -> Tensor:
        # Without a mean over features: a layer norm then stays in the space.
        first = torch.randn(width, count, generator=generator)
        return torch.linalg.qr(first - first.mean(0))[0]

    # Hidden states, queries and keys of half as many directions as features: a student of half the width has all.
    hidden = basis(48, 24)
    with torch.no_grad():
        for table in teacher.bert.embeddings.modules():
            if isinstance(table, torch.nn.Embedding):
                table.weight.copy_(table.weight @ hidden @ hidden.T)
        for key, matrix in iter_block_matrices(teacher):
            if key[1] in ("attention_output", "ffn_out"):
                matrix.weight.copy_(hidden @ hidden.T @ matrix.weight)
        for layer in (1, 2):
            heads = torch.block_diag(*((one := basis(12, 6)) @ one.T for _ in range(4)))
            for name in ("query", "key"):
                module = block_matrix(teacher, layer, name).module
                module.weight.copy_(heads @ module.weight)
                module.bias.copy_(heads @ torch.randn(48, generator=generator))
    student = projected(teacher, hidden_size=24, heads=4).model
    for layer in (1, 2):
        seen: list[Tensor] = []
        hook = block_matrix(teacher, layer, "query").module.register_forward_pre_hook(
            lambda _, given, seen=seen: seen.append(given[0])
        )
        with torch.no_grad():
            teacher(**batches(1)[0])
        hook.remove()
        scores = []
        narrow = seen[0] @ spaces_of(student, layer)["attention_output"].float()
        for model, vectors in ((teacher, seen[0]), (student, narrow)):
            with torch.no_grad():
                query, key = (
                    block_matrix(model, layer, name).module(vectors).unflatten(-1, (4, -1)).transpose(1, 2)
                    for name in ("query", "key")
                )
            scores.append(query @ key.transpose(2, 3) / query.shape[-1] ** 0.5)
        error = (scores[0] - scores[1]).norm() / scores[0].norm()
        assert error < 1e-2, error


@pytest.mark.parametrize("family", ["bert", "albert", "deberta-v2"])
def test_every_matrix_starts_with_the_mean_of_its_teacher_s_output(family: str):
    teacher = tiny(family)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, matrix in iter_block_matrices(teacher):
            matrix.module.bias.copy_(torch.randn(matrix.module.bias.shape, generator=generator))
    student = projected(teacher, hidden_size=24, heads=3, intermediate_size=40).model
    moments = moments_of(teacher, batches())
    paths = {module: path for path, module in teacher.named_modules()}
    giver = {"attention_output": "value", "ffn_out": "ffn_in"}
    for (layer, name), own in iter_block_matrices(student):
        spaces, other = spaces_of(student, layer), block_matrix(teacher, layer, name)
        mean = moments[paths[other.module]].mean
        expected = spaces[name].T @ (other.weight.double() @ mean + other.of(other.module.bias))
        given = spaces[giver.get(name, "attention_output")].T @ mean
        found = own.weight.double() @ given + own.of(own.module.bias)
        assert (found - expected).norm() < 1e-4 * expected.norm(), (layer, name)


def test_two_starts_are_equal_bit_for_bit():
    teacher = tiny("bert")
    first, second = (projected(teacher, hidden_size=16, heads=4).model.state_dict() for _ in range(2))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    # The teacher's weights come from the teacher again: no checkpoint holds them.
    assert not any(key.endswith("teacher") for key in first)


def test_a_tied_head_stays_tied_to_the_projected_table():
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    teacher = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", vocab_size=220, **sizes)).eval()
    student = projected(teacher, hidden_size=16, heads=4).model
    decoder, table = student.get_output_embeddings(), student.get_input_embeddings()
    assert torch.equal(decoder.weight, table.weight)
    before = probe(student)
    merge_projections(student)
    assert decoder.weight is table.weight
    assert torch.equal(probe(student), before)
    assert (probe(projected(teacher).model) - probe(teacher)).abs().max() < 1e-4


def test_projections_compare_outputs_of_the_right_width():
    for family in ("bert", "modernbert", "electra"):
        teacher = tiny(family)
        student = projected(teacher, hidden_size=24, heads=3, intermediate_size=40).model
        keys = [(layer, name) for layer in (1, 2) for name in FAMILIES[family].matrices]
        found = projections_of(student, [*keys, (0, EMBEDDINGS)])
        own, other = (dict(iter_block_matrices(model)) for model in (student, teacher))
        for key in keys:
            assert found[key].shape == (other[key].weight.shape[0], own[key].weight.shape[0]), key
        assert found[(0, EMBEDDINGS)].shape == (32, 24)
        assert not projections_of(teacher, keys)


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"hidden_size": 64}, "student.hidden_size"),
        ({"hidden_size": 16, "heads": 8}, "student.heads"),
        ({"hidden_size": 32, "heads": 2}, "student.heads"),
        ({"intermediate_size": 65}, "student.intermediate_size"),
        ({"layers": 3}, "student.layers"),
    ],
)
def test_sizes_above_the_teacher_s_are_refused(fields: dict[str, Any], place: str):
    with pytest.raises(InputError) as found:
        build_student(tiny("bert"), StudentSection(form="width", init="projections", **fields), seed=0)
    assert found.value.where == place


def test_a_width_that_takes_the_map_after_the_embeddings_away_is_refused():
    with pytest.raises(InputError, match="no map after") as found:
        projected(tiny("electra"), hidden_size=16)
    assert found.value.where == "student.hidden_size"


def test_chains_are_refused():
    section = StudentSection(form="width", init="projections", hidden_size=16)
    with pytest.raises(InputError, match="no chains"):
        build_student(tiny("bert"), section, seed=0, overparam=OverparamSection())


def spread_of(width: int, tokens: int = 400) -> Moment:
    torch.manual_seed(3)
    moment = Moment()
    mixing = torch.randn(width, width, dtype=torch.float64) * torch.logspace(0, -2, width, dtype=torch.float64)
    moment.add(torch.randn(tokens, width, dtype=torch.float64) @ mixing.T + 0.5)
    return moment


def test_directions_span_the_principal_subspace():
    spread = spread_of(12).covariance
    space = directions(spread, 5)
    values, vectors = torch.linalg.eigh(spread)
    assert torch.allclose(space.T @ space, torch.eye(5, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(space @ space.T, vectors[:, -5:] @ vectors[:, -5:].T, atol=1e-8)
    assert float((space.T @ spread @ space).trace()) == pytest.approx(float(values[-5:].sum()))
    # Of the bases of that subspace, it is nearer to single features than the principal directions themselves.
    assert space.abs().amax(0).mean() > vectors[:, -5:].abs().amax(0).mean()


def test_reading_is_the_least_squares_reconstruction():
    torch.manual_seed(5)
    rows = torch.randn(500, 10, dtype=torch.float64) @ torch.randn(10, 10, dtype=torch.float64)
    moment = Moment()
    moment.add(rows)
    space = selection(10, [1, 4, 5, 8])
    expected = torch.linalg.lstsq(rows @ space, rows).solution.T
    assert torch.allclose(reading(moment.second, space), expected, atol=1e-4)
    principal = directions(moment.second, 4)
    assert torch.allclose(reading(moment.second, principal), principal, atol=1e-4)
    assert torch.equal(reading(moment.second, selection(10, range(10))), selection(10, range(10)))


@pytest.mark.parametrize("biased", [True, False])
def test_a_fitted_norm_has_the_least_error_of_all_gains_and_biases(biased: bool):
    torch.manual_seed(6)
    inputs = torch.randn(3000, 16, dtype=torch.float64) @ torch.randn(16, 16, dtype=torch.float64)
    gain = 0.5 + torch.rand(16, dtype=torch.float64)
    bias = torch.randn(16, dtype=torch.float64) if biased else None
    norm = torch.nn.functional.layer_norm
    output = norm(inputs, (16,), gain, bias)
    moment = Moment()
    moment.add(output)
    space = directions(moment.spread(biased), 10)
    found_gain, found_bias = fitted_norm(gain, bias, moment, space, centres=True)
    plain, target = norm(inputs @ space, (10,)), output @ space
    for feature in range(10):
        columns = [plain[:, feature], torch.ones(3000, dtype=torch.float64)][: 1 + biased]
        table = torch.stack(columns, 1)
        best = torch.linalg.lstsq(table, target[:, feature : feature + 1]).solution.flatten()
        ours = torch.stack([found_gain[feature], *([found_bias[feature]] if found_bias is not None else [])])
        least, error = (float((table @ one - target[:, feature]).square().mean()) for one in (best, ours))
        # Lengths are taken to agree on the mean over tokens, not on each.
        assert error <= 1.1 * least + 0.01 * float(target[:, feature].var())


def test_a_projected_weight_is_the_product_of_its_sides_share_by_share():
    torch.manual_seed(1)
    teacher, read = torch.randn(12, 8), torch.randn(8, 5)
    writes = [torch.randn(6, 3), torch.randn(6, 3)]
    both = ProjectedWeight(teacher, write=torch.cat(writes), read=read, parts=2)
    expected = torch.cat([write.T @ part @ read for write, part in zip(writes, teacher.chunk(2), strict=True)])
    trained = both.right_inverse(teacher)
    assert torch.allclose(both(*trained), expected, atol=1e-5)
    # A step in which all moves agree moves the weight by the rate on average: sides of one sign let all agree.
    both = ProjectedWeight(teacher.abs(), write=torch.cat(writes).abs(), read=read.abs(), parts=2)
    trained = both.right_inverse(teacher)
    for place in range(2):
        moved = [one + 1e-3 * (number == place) for number, one in enumerate(trained)]
        assert float((both(*moved) - both(*trained)).mean()) == pytest.approx(1e-3, rel=1e-2)
