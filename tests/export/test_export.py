import io
import json
import shutil
import time
from itertools import cycle
from pathlib import Path

import pytest
import torch
from families import NAMES, tiny, tokenizer
from rich.console import Console
from transformers import AutoConfig, AutoModelForMaskedLM, BertForNextSentencePrediction

from kdcli.cli import render
from kdcli.errors import GateError, InputError
from kdcli.export import export as export_module
from kdcli.export.export import export_model
from kdcli.export.graph import export_onnx, operators
from kdcli.export.latency import is_steady, measure
from kdcli.export.parity import parity
from kdcli.export.session import MODEL, OnnxModel
from kdcli.models.lowrank import LowRankDecoder, LowRankEmbedding, LowRankLinear
from kdcli.models.overparam import overparameterise
from kdcli.models.student import build_student
from kdcli.recipe.schema import EvaluateSection, OverparamSection, StudentSection, TaskSection
from kdcli.tasks.load import load_task
from kdcli.tensors.parametrization import is_overparameterised


def batch(size: int, length: int, padded: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 150, (size, length), generator=torch.Generator().manual_seed(size * length))
    mask = torch.ones_like(ids)
    if padded:
        mask[-1, -padded:] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph of a plain `tiny("bert")`, in its folder."""
    return export_onnx(tiny("bert"), tokenizer(), tmp_path_factory.mktemp("dense") / "onnx").parent


# The code of one family under another's name.
SLOW = ("xlm-roberta", "camembert", "roberta", "electra", "distilbert", "mpnet", "albert", "modernbert")
# One block is as good as two, but where blocks share weights, or attend to a window in turn.
LAYERS = {"albert": 2, "modernbert": 2}


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NAMES]
)
def test_every_familys_graph_gives_the_models_logits(family: str, tmp_path: Path):
    model = tiny(family, layers=LAYERS.get(family, 1))
    export_onnx(model, tokenizer(), tmp_path / "onnx")
    exported = OnnxModel(tmp_path / "onnx")
    takes_types = "token_type_ids" in exported.inputs
    for size, length, padded in ((1, 1, 0), (1, 16, 0), (3, 7, 4), (5, 33, 32)):
        inputs = batch(size, length, padded)
        if not takes_types:
            inputs.pop("token_type_ids")
        assert max(parity(model, exported, [inputs]).values()) < 1e-4, (size, length, padded)


def test_opset_23_has_one_attention_node_a_block(dense: Path):
    assert operators(dense / MODEL)["Attention"] == 2


def test_an_overparameterised_model_exports_as_the_plain_student(dense: Path, tmp_path: Path):
    wide = tiny("bert")
    overparameterise(wide, OverparamSection(length=2))
    assert operators(export_onnx(wide, tokenizer(), tmp_path / "wide")) == operators(dense / MODEL)
    assert is_overparameterised(wide), "the given model must not change"
    assert max(parity(tiny("bert"), OnnxModel(tmp_path / "wide"), [batch(2, 9)]).values()) < 1e-4


def test_low_rank_factors_stay_factors(dense: Path, tmp_path: Path):
    teacher = AutoModelForMaskedLM.from_config(tiny("bert").config).eval()
    student = build_student(teacher, StudentSection(form="low-rank", rank=4, embedding_rank=6), seed=0).model
    assert {LowRankLinear, LowRankEmbedding, LowRankDecoder} <= {type(m) for m in student.modules()}
    export_onnx(student, tokenizer(), tmp_path / "low")
    low = OnnxModel(tmp_path / "low")
    assert low.megabytes < OnnxModel(dense).megabytes
    assert max(parity(student, low, [batch(2, 9, 3)]).values()) < 1e-4


def test_an_export_checks_real_inputs_and_times_the_teacher(tmp_path: Path):
    task = load_task(TaskSection(name="reviews", train_samples=50), EvaluateSection(), base=tmp_path)
    result = export_model(
        tiny("bert", layers=1), tokenizer(), tmp_path / "out", task=task, teacher=tiny("bert", layers=1), runs=2,
        batch_sizes=[1], sequence_lengths=[8],
    )  # fmt: skip
    document = json.loads(json.dumps(result.to_json()))
    assert document["parity"]["max_abs_difference"] < 1e-4
    rows = {(row["model"], row["backend"]) for row in document["latency"]["rows"]}
    assert rows == {(m, b) for m in ("student", "teacher") for b in ("PyTorch", "ONNX Runtime")}
    assert {"model.onnx", "config.json", "tokenizer.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    with pytest.raises(InputError, match="exists"):
        export_model(tiny("bert"), tokenizer(), tmp_path / "out", task=task, latency=False)


def test_a_graph_that_disagrees_is_not_kept(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    other = tiny("bert", seed=7)
    monkeypatch.setattr(
        export_module, "export_onnx", lambda m, t, f, **k: shutil.copytree(dense, f, dirs_exist_ok=True)
    )
    with pytest.raises(GateError, match="differ"):
        export_model(other, tokenizer(), tmp_path / "out", task=None, latency=False)
    assert not list(tmp_path.iterdir())


def test_latency_gives_every_cell_and_restores_the_threads(dense: Path):
    before = torch.get_num_threads()
    models = {"m": (tiny("bert"), OnnxModel(dense, threads=1))}
    report = measure(models, batch_sizes=[1, 2], sequence_lengths=[4], threads=1, runs=5, vocab_size=150)
    assert torch.get_num_threads() == before
    assert len(report.rows) == 4
    for row in report.rows:
        assert 0 < row["p50"] <= row["p95"] <= row["p99"]
        assert row["throughput"] > 0


class Timed:
    """Stands for a model whose calls take as long as we say, in milliseconds, one after the other in turn."""

    def __init__(self, *milliseconds: float) -> None:
        self.config = AutoConfig.for_model("bert")
        self.turns = cycle(milliseconds)
        self.calls = 0

    def __call__(self, **inputs: torch.Tensor) -> None:
        self.calls += 1
        time.sleep(next(self.turns) / 1000)


def test_a_grid_ends_in_its_time_and_tells_how_many_runs_it_had():
    fast, slow = Timed(1), Timed(80)
    begun = time.perf_counter()
    report = measure(
        {"fast": (fast, None), "slow": (slow, None)},
        batch_sizes=[1, 2],
        sequence_lengths=[4, 8],
        threads=1,
        limit=3.0,
    )
    assert time.perf_counter() - begun < 4.5
    rows = report.to_json()["rows"]
    assert len(rows) == 8 and all(1 <= row["runs"] < 15 for row in rows)
    # Every round asks each twice; the rounds that are not counted come on top.
    assert fast.calls == slow.calls >= 2 * sum(row["runs"] for row in rows if row["model"] == "slow")
    quick = measure({"fast": (Timed(1), None)}, batch_sizes=[1], sequence_lengths=[4], threads=1)
    assert quick.rows[0]["runs"] == 30
    asked = measure({"slow": (Timed(80), None)}, batch_sizes=[1], sequence_lengths=[4], threads=1, runs=6, limit=0.1)
    assert asked.rows[0]["runs"] == 6


def test_a_cell_of_unsteady_times_is_marked_wherever_it_is_shown():
    # Of four timed calls two take three times as long: each round times every second call.
    even, jumpy = Timed(30), Timed(30, 30, 30, 90)
    report = measure(
        {"even": (even, None), "jumpy": (jumpy, None)}, batch_sizes=[1], sequence_lengths=[4], threads=1, runs=8
    )
    assert [row["steady"] for row in report.to_json()["rows"]] == [True, False]
    doubt = report.doubt()
    assert doubt is not None and "1 of 2" in doubt and "jumpy 1 x 4 in PyTorch" in doubt and "even" not in doubt
    output = io.StringIO()
    Console(file=output, width=80).print(render.latency(report))
    lines = {line.split()[0]: line.split() for line in output.getvalue().splitlines() if line.strip()}
    assert lines["jumpy"][5].endswith("*") and lines["jumpy"][-1] == "1.00x*" and "*" not in " ".join(lines["even"])
    only = measure({"even": (even, None)}, batch_sizes=[1], sequence_lengths=[4], threads=1, runs=8)
    output.truncate(0)
    Console(file=output, width=80).print(render.latency(only))
    assert only.doubt() is None and "*" not in output.getvalue()


@pytest.mark.parametrize(
    ("times", "steady"),
    [
        ([10.0] * 30, True),
        # Hiccups and a slow drift of the clock.
        ([10.0] * 24 + [100.0] * 6, True),
        ([10.0 + 0.1 * n for n in range(30)], True),
        # A loaded machine: rarely left alone.
        ([10.0] + [20.0] * 29, False),
        ([10.0] * 20 + [30.0] * 10, False),
        ([10.0] * 4, False),
    ],
)
def test_times_are_steady_when_most_are_near_the_fastest(times: list[float], steady: bool):
    assert is_steady(times) is steady


def test_a_folder_without_a_graph_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=MODEL):
        OnnxModel(tmp_path)
    (tmp_path / MODEL).write_bytes(b"no graph")
    with pytest.raises(InputError, match="cannot be run"):
        OnnxModel(tmp_path)


def test_a_model_whose_head_no_kind_of_task_has_is_refused_by_name(tmp_path: Path):
    model = BertForNextSentencePrediction(tiny("bert", layers=1).config)
    with pytest.raises(InputError, match="no type of task has the head of BertForNextSentencePrediction"):
        export_model(model, tokenizer(), tmp_path / "onnx", task=None)
