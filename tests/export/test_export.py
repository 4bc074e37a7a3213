import json
from pathlib import Path

import pytest
import torch
from families import NAMES, tiny, tokenizer

from kdcli.errors import GateError, InputError
from kdcli.export import export as export_module
from kdcli.export.export import export_model
from kdcli.export.graph import export_onnx, operators
from kdcli.export.latency import measure
from kdcli.export.parity import parity
from kdcli.export.session import MODEL, OnnxModel
from kdcli.models.forms import build_student
from kdcli.models.lowrank import LowRankLinear
from kdcli.recipe.schema import EvaluateSection, OverparamSection, StudentSection, TaskSection
from kdcli.tasks.load import load_task
from kdcli.tensors.parametrize import is_overparameterised, overparameterise


def batch(size: int, length: int, padded: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 150, (size, length), generator=torch.Generator().manual_seed(size * length))
    mask = torch.ones_like(ids)
    if padded:
        mask[-1, -padded:] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


@pytest.mark.parametrize("family", NAMES)
def test_every_family_says_the_same_in_onnx(family: str, tmp_path: Path):
    model = tiny(family)
    export_onnx(model, tokenizer(), tmp_path / "onnx")
    exported = OnnxModel(tmp_path / "onnx")
    takes_types = "token_type_ids" in exported.inputs
    for size, length, padded in ((1, 1, 0), (1, 16, 0), (3, 7, 4), (5, 33, 32)):
        inputs = batch(size, length, padded)
        if not takes_types:
            inputs.pop("token_type_ids")
        assert parity(model, exported, [inputs]) < 1e-4, (size, length, padded)


def test_opset_23_has_one_attention_node_a_block(tmp_path: Path):
    path = export_onnx(tiny("bert", layers=3), tokenizer(), tmp_path / "onnx")
    assert operators(path)["Attention"] == 3


def test_an_overparameterised_model_exports_as_the_plain_student(tmp_path: Path):
    plain = tiny("bert")
    wide = tiny("bert")
    overparameterise(wide, OverparamSection(length=2))
    nodes = [operators(export_onnx(m, tokenizer(), tmp_path / n)) for m, n in ((plain, "plain"), (wide, "wide"))]
    assert nodes[0] == nodes[1]
    assert is_overparameterised(wide), "the given model must not change"
    assert parity(plain, OnnxModel(tmp_path / "wide"), [batch(2, 9)]) < 1e-4


def test_low_rank_factors_stay_factors(tmp_path: Path):
    student = build_student(tiny("bert"), StudentSection(form="low-rank", rank=4), seed=0).model
    assert any(isinstance(m, LowRankLinear) for m in student.modules())
    export_onnx(student, tokenizer(), tmp_path / "low")
    export_onnx(tiny("bert"), tokenizer(), tmp_path / "dense")
    low, dense = OnnxModel(tmp_path / "low"), OnnxModel(tmp_path / "dense")
    assert low.megabytes < dense.megabytes
    assert parity(student, low, [batch(2, 9, 3)]) < 1e-4


def test_an_export_checks_real_inputs_and_times_the_teacher(tmp_path: Path):
    task = load_task(TaskSection(name="reviews", train_samples=50), EvaluateSection(), base=tmp_path)
    result = export_model(
        tiny("bert", layers=1), tokenizer(), tmp_path / "out", task=task, teacher=tiny("bert"), runs=2,
        batch_sizes=[1], sequence_lengths=[8],
    )  # fmt: skip
    document = json.loads(json.dumps(result.to_json()))
    assert document["parity"]["max_abs_difference"] < 1e-4
    rows = {(row["model"], row["backend"]) for row in document["latency"]["rows"]}
    assert rows == {(m, b) for m in ("student", "teacher") for b in ("PyTorch", "ONNX Runtime")}
    assert {"model.onnx", "config.json", "tokenizer.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    with pytest.raises(InputError, match="exists"):
        export_model(tiny("bert"), tokenizer(), tmp_path / "out", task=task, latency=False)


def test_a_graph_that_disagrees_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tiny("bert")
    other = tiny("bert", seed=7)
    original = export_module.export_onnx
    monkeypatch.setattr(export_module, "export_onnx", lambda m, t, f, **k: original(other, t, f, **k))
    with pytest.raises(GateError, match="differ"):
        export_model(model, tokenizer(), tmp_path / "out", task=None, latency=False)
    assert not list(tmp_path.iterdir())


def test_latency_gives_every_cell_and_restores_the_threads(tmp_path: Path):
    model = tiny("bert")
    export_onnx(model, tokenizer(), tmp_path / "onnx")
    before = torch.get_num_threads()
    models = {"m": (model, OnnxModel(tmp_path / "onnx", threads=1))}
    report = measure(models, batch_sizes=[1, 2], sequence_lengths=[4], threads=1, runs=5, vocab_size=150)
    assert torch.get_num_threads() == before
    assert len(report.rows) == 4
    for row in report.rows:
        assert 0 < row["p50"] <= row["p95"] <= row["p99"]
        assert row["throughput"] > 0


def test_a_folder_without_a_graph_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=MODEL):
        OnnxModel(tmp_path)
    (tmp_path / MODEL).write_bytes(b"no graph")
    with pytest.raises(InputError, match="cannot be run"):
        OnnxModel(tmp_path)
