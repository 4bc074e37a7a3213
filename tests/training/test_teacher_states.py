"""A student that learns from states on disk becomes what it becomes beside a teacher that runs."""

import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import NAMES, tiny, tokenizer
from rich.console import Console
from safetensors.torch import load_file
from tiny_recipes import run_recipe, tiny_recipe, write_recipe
from torch import Tensor
from training.stages import Killed, kill_after, rows
from transformers import PreTrainedModel

from kdcli.distill.plan import make_plan
from kdcli.distill.prepare import prepare
from kdcli.distill.recipe import load_recipe
from kdcli.errors import InputError
from kdcli.methods.base import Term
from kdcli.models.capture import Capture
from kdcli.models.families import family_of
from kdcli.models.finite import NotFiniteError
from kdcli.objectives.attention import AttentionObjective
from kdcli.objectives.base import Objective
from kdcli.objectives.hidden import HiddenObjective
from kdcli.objectives.matrix import MatrixObjective
from kdcli.objectives.output import OutputObjective
from kdcli.objectives.relation import RelationObjective
from kdcli.signals import Request
from kdcli.tasks.classification import KIND as CLASSIFICATION
from kdcli.tasks.encode import Collator
from kdcli.training.step import Distiller
from kdcli.training.teacher_cache import known_outputs
from kdcli.training.teacher_states import PLACE, KeptStates, StatesCollator, keep_states, layout_of

WORDS = tokenizer()
COLLATOR = Collator(WORDS)
ROWS = rows(21)
BATCH = [3, 0, 17, 9, 12, 5]
LAST = [(2, 2)]


def request_of(*objectives: Objective) -> Request:
    request = Request()
    for objective in objectives:
        request |= objective.teacher_request()
    return request


def every_objective(teacher: PreTrainedModel) -> list[Objective]:
    """Return what asks for hidden states, matrix outputs, attention and relations, and for predictions."""
    pairs = [(1, 1), (2, 2)]
    return [
        MatrixObjective(pairs, sorted(family_of(teacher.config).matrices)),
        HiddenObjective([(0, 0), *pairs]),
        AttentionObjective(pairs, measure="mse"),
        RelationObjective(pairs, relations={("query", "key"): 1.0, ("value", "value"): 1.0}),
        OutputObjective(CLASSIFICATION.distribution),
    ]


def keep(teacher: PreTrainedModel, request: Request, folder: Path, dtype: Any = "fp32", **options: Any) -> KeptStates:
    options = {"batch_size": 8, "device": "cpu", "console": Console(quiet=True), **options}
    layout = layout_of(teacher, request, dtype)
    return keep_states(
        teacher, ROWS, COLLATOR, kind=CLASSIFICATION, request=request, layout=layout, folder=folder, **options
    )


def batch_of(kept: KeptStates) -> dict[str, Any]:
    rows = kept.placed(ROWS)
    return StatesCollator(COLLATOR, kept)([rows[i] for i in BATCH])


@pytest.mark.parametrize("family", NAMES)
def test_terms_and_their_gradients_are_those_beside_a_running_teacher(family: str, tmp_path: Path):
    teacher = tiny(family)
    objectives = every_objective(teacher)
    request = request_of(*objectives)
    kept = keep(teacher, request, tmp_path / "states")
    known = known_outputs(teacher, ROWS, COLLATOR, batch_size=8)
    found = []
    for options in ({"teacher": teacher}, {"teacher_states": kept, "teacher_outputs": known}):
        # A window that is wider than any text leaves the teacher's alone.
        student = tiny(family, seed=1, **({"local_attention": 64} if family == "modernbert" else {})).train()
        terms = [Term(str(number), objective) for number, objective in enumerate(objectives)]
        distiller = Distiller(student, terms, kind=CLASSIFICATION, **options)
        torch.manual_seed(0)
        result = distiller(batch_of(kept) if "teacher_states" in options else COLLATOR(ROWS.select(BATCH)))
        result["loss"].backward()
        gradients = [p.grad for p in student.parameters() if p.grad is not None]
        found.append((torch.stack(list(result.values())).detach(), torch.cat([g.flatten() for g in gradients])))
        distiller.close()
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)


def test_states_are_those_of_a_pass_by_itself_without_padding(tmp_path: Path):
    teacher = tiny("bert")
    request = Request(hidden=frozenset({0, 2}), matrices=frozenset({(1, "value"), (2, "ffn_in")}))
    kept = keep(teacher, request, tmp_path / "states")
    assert kept.path.stat().st_size == sum(ROWS["length"]) * (32 + 64 + 2 * 32) * 4
    batch = batch_of(kept)
    inputs = ("input_ids", "attention_mask")
    signals, real = kept.signals(batch), batch["attention_mask"] == 1
    assert set(signals.hidden) == {0, 2} and set(signals.matrices) == {(1, "value"), (2, "ffn_in")}
    for states in (*signals.hidden.values(), *signals.matrices.values()):
        assert (states[~real] == 0).all() and (states[real] != 0).any(-1).all()
    for row, place in enumerate(BATCH):
        length, capture = ROWS[place]["length"], Capture(teacher, request, CLASSIFICATION)
        with torch.no_grad(), capture:
            expected = capture.run({name: COLLATOR([ROWS[place]])[name][:, :length] for name in inputs})
        capture.close()
        torch.testing.assert_close(signals.hidden[2][row, :length], expected.hidden[2][0])
        torch.testing.assert_close(signals.matrices[(2, "ffn_in")][row, :length], expected.matrices[(2, "ffn_in")][0])


def test_bf16_takes_half_the_room_and_is_the_nearest_number(tmp_path: Path):
    teacher, request = tiny("bert"), Request(hidden=frozenset({2}))
    exact, half = keep(teacher, request, tmp_path / "a"), keep(teacher, request, tmp_path / "b", "bf16")
    assert half.path.stat().st_size * 2 == exact.path.stat().st_size
    states = half.signals(batch_of(half)).hidden[2]
    assert torch.equal(states, exact.signals(batch_of(exact)).hidden[2].bfloat16())


def test_a_teacher_whose_states_are_kept_never_runs(tmp_path: Path):
    teacher, objective = tiny("bert"), HiddenObjective([(1, 1)])
    request = request_of(objective)
    kept = keep(teacher, request, tmp_path / "states")
    passes: list[int] = []
    teacher.bert.embeddings.register_forward_hook(lambda *_: passes.append(1))
    options: dict[str, Any] = {"teacher": teacher, "teacher_states": kept}
    distiller = Distiller(tiny("bert", seed=1).train(), [Term("hidden", objective)], kind=CLASSIFICATION, **options)
    distiller(batch_of(kept))
    assert not passes and distiller.teacher_capture is None


def test_rows_that_were_not_kept_get_no_states(tmp_path: Path):
    kept = keep(tiny("bert"), Request(hidden=frozenset({2})), tmp_path / "states")
    assert PLACE not in StatesCollator(COLLATOR, kept)([ROWS[0]])


def test_predictions_come_from_the_same_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    teacher, passes = tiny("bert"), []
    expected = known_outputs(teacher, ROWS, COLLATOR, batch_size=8, use_cache=False).tables["logits"]
    teacher.register_forward_hook(lambda *_: passes.append(1))
    keep(teacher, request_of(*every_objective(teacher)), tmp_path / "states")
    known = known_outputs(teacher, ROWS, COLLATOR, batch_size=8)
    assert len(passes) == 3 and torch.equal(known.tables["logits"], expected)


def test_another_process_maps_the_file_itself(tmp_path: Path):
    kept = keep(tiny("bert"), Request(hidden=frozenset({2})), tmp_path / "states")
    batch = batch_of(kept)
    expected = kept.signals(batch).hidden[2]
    sent = pickle.dumps(kept)
    assert len(sent) < kept.path.stat().st_size / 2
    assert torch.equal(pickle.loads(sent).signals(batch).hidden[2], expected)


@pytest.mark.parametrize("damage", ["none", "cut", "one bit", "no table", "no record", "its record", "a file"])
def test_what_is_there_is_used_or_made_again_with_a_note(damage: str, tmp_path: Path):
    teacher, request, folder = tiny("bert"), Request(hidden=frozenset({1})), tmp_path / "states"
    table, record = keep(teacher, request, folder).path, folder / "record.json"
    whole = table.read_bytes()
    if damage == "cut":
        table.write_bytes(whole[:-8])
    elif damage == "one bit":
        table.write_bytes(whole[:99] + bytes([whole[99] ^ 1]) + whole[100:])
    elif damage == "no table":
        table.unlink()
    elif damage == "no record":
        record.unlink()
    elif damage == "its record":
        record.write_text(json.dumps({**json.loads(record.read_text()), "bands": {"1": [1, 1]}}))
    elif damage == "a file":
        shutil.rmtree(folder)
        folder.write_text("in the way")
    passes: list[int] = []
    teacher.bert.encoder.layer[0].register_forward_hook(lambda *_: passes.append(1))
    output = io.StringIO()
    kept = keep(teacher, request, folder, console=Console(file=output, width=400))
    assert kept.path.read_bytes() == whole
    assert bool(passes) == ("is made again" in output.getvalue()) == (damage != "none")


@pytest.mark.parametrize("change", ["teacher", "states", "type"])
def test_states_of_something_else_are_not_used(change: str, tmp_path: Path):
    teacher, request, folder = tiny("bert"), Request(hidden=frozenset({1})), tmp_path / "states"
    before = keep(teacher, request, folder).path.read_bytes()
    if change == "teacher":
        teacher = tiny("bert", seed=3)
    if change == "states":
        request = Request(hidden=frozenset({2}))
    after = keep(teacher, request, folder, "bf16" if change == "type" else "fp32")
    assert after.path.read_bytes() != before
    fresh = keep(teacher, request, tmp_path / "fresh", "bf16" if change == "type" else "fp32")
    assert after.path.read_bytes() == fresh.path.read_bytes()


def test_a_pass_that_ends_early_leaves_nothing(tmp_path: Path):
    teacher, request, folder = tiny("bert"), Request(hidden=frozenset({2})), tmp_path / "states"
    passes: list[int] = []

    def stop(*_: Any) -> None:
        passes.append(1)
        if len(passes) == 2:
            raise Killed

    hook = teacher.bert.embeddings.register_forward_hook(stop)
    with pytest.raises(Killed):
        keep(teacher, request, folder)
    assert not list(tmp_path.iterdir())
    hook.remove()
    assert keep(teacher, request, folder).path.exists()


def test_numbers_that_are_none_are_never_kept(tmp_path: Path):
    teacher = tiny("bert")
    with torch.no_grad():
        teacher.bert.encoder.layer[0].output.dense.bias[0] = torch.inf
    with pytest.raises(NotFiniteError, match="hidden states or matrix outputs of the teacher contain NaN or inf"):
        keep(teacher, Request(hidden=frozenset({1})), tmp_path / "states")
    assert not list(tmp_path.iterdir())


MAKD = {"name": "makd", "schedule": "staged"}


def recipe_of(folder: Path, cache: Any, method: Any = MAKD, **changes: Any) -> Path:
    document = tiny_recipe(
        "student",
        "method",
        method=method,
        **{"teacher": {"cache": cache}, "train": {"max_steps": 10, "batch_size": 16, "eval_every": 2}, **changes},
    )
    folder.mkdir(exist_ok=True)
    return write_recipe(folder / "recipe.toml", document)


def weights_of(path: Path) -> dict[str, Tensor]:
    return load_file(path.parent / "runs" / "recipe" / "student" / "model.safetensors")


def test_a_run_is_planned_killed_and_resumed_to_the_weights_of_a_run_without_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain, kept = recipe_of(tmp_path / "plain", True), recipe_of(tmp_path / "kept", "all")
    run_recipe(plain)
    plan = make_plan(prepare(load_recipe(kept, []), kept))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 2, "2-layer")
        run_recipe(kept)
    [table] = kept.parent.rglob("states.bin")
    assert [table.stat().st_size] == [states.bytes for states in plan.states]
    # A resumed run checks what it finds.
    table.write_bytes(table.read_bytes()[:-1])
    output = io.StringIO()
    run_recipe(kept, resume=True, console=Console(file=output, width=400))
    assert "is made again: states.bin has" in output.getvalue()
    assert not list(kept.parent.rglob("*states*"))
    with_states, without = weights_of(kept), weights_of(plain)
    assert with_states.keys() == without.keys()
    for name, weight in without.items():
        torch.testing.assert_close(with_states[name], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("adkd", "compares gradients of the teacher"),
        ("lgtm", "its teacher learns"),
        ("theseus", "blocks run between those of the student"),
        ("dbkd", "decisions alone"),
        ({"name": "makd", "weights": {"layer": 0.0}, "matrix_inputs": "teacher"}, "the teacher runs in each step"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_the_reason(method: Any, reason: str, tmp_path: Path):
    path = recipe_of(tmp_path, "all", {"name": method} if isinstance(method, str) else method)
    with pytest.raises(InputError, match=reason) as error:
        prepare(load_recipe(path, []), path)
    assert error.value.where == "teacher.cache" and error.value.hint == "set teacher.cache = true"


def test_a_method_that_compares_predictions_alone_keeps_nothing_more(tmp_path: Path):
    path = recipe_of(tmp_path, "all", {"name": "kd"})
    assert make_plan(prepare(load_recipe(path, []), path)).states == []


def test_a_disk_without_room_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = recipe_of(tmp_path, "all")
    [states] = make_plan(prepare(load_recipe(path, []), path)).states
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=states.bytes - 1))
        with pytest.raises(InputError, match="GB free") as error:
            run_recipe(path)
    assert error.value.where == "teacher.cache" and "cache_dtype" in (error.value.hint or "")
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=states.bytes))
    run_recipe(path, "train.max_steps=3")
