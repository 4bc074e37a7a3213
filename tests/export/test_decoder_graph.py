"""The graph with a key-value cache: the model's logits and text, whole and with the cache, and how fast it is."""

import json
from pathlib import Path
from typing import Any

import onnx
import pyarrow as pa
import pytest
import torch
from families import DECODERS, EXTRA, tiny, tokenizer
from scripts import answers_of_script
from small_decoder import model as small_model
from small_decoder import tokenizer as small_tokenizer

import kdcli.export.export as export_module
from kdcli.data.columns import Column
from kdcli.data.tables import dataset_of
from kdcli.errors import GateError, InputError
from kdcli.export.decoder import OnnxDecoder, open_graph
from kdcli.export.export import ExportResult, export_model
from kdcli.export.genai import Form, obstacle
from kdcli.export.graph import export_decoder, plain_copy
from kdcli.export.latency import FIRST, NEXT, measure, texts
from kdcli.export.parity import text_parity
from kdcli.export.script import script_of
from kdcli.models.families import FAMILIES
from kdcli.models.generation import GREEDY, Sampling, generate
from kdcli.models.heads import CAUSAL_LM
from kdcli.models.load import load_tokenizer
from kdcli.models.lowrank import LowRankLinear
from kdcli.models.student import build_student
from kdcli.recipe.schema import StudentSection
from kdcli.tasks.causal_lm import KIND as CAUSAL
from kdcli.tasks.generated import Writing
from kdcli.tasks.heads import load_model
from kdcli.tasks.instruct import KIND as INSTRUCT
from kdcli.tasks.instruct import InstructFields

PROMPTS = [[1, 5, 7, 9, 11], [1, 30], [1, 42, 8, 3, 3, 3, 17, 60], [1, 9, 9], [1], [1, 30]]
KEYS: dict[str, Any] = {"max_new_tokens": 12, "end": {2, *range(40, 48)}, "pad": 0}


def draws(model: Any, **options: Any) -> list[list[int]]:
    return generate(model, PROMPTS, sampling=Sampling(1.0, top_k=50), seed=3, **KEYS, **options)


@pytest.fixture(scope="module")
def stories(data_dir: Path) -> Path:
    return data_dir.parent / "models" / "stories260K"


@pytest.fixture(scope="module")
def exported(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ExportResult, OnnxDecoder]:
    """A trained model, grouped heads and all, and its graph."""
    model = load_model(stories)
    options: dict[str, Any] = {"batch_sizes": [2], "sequence_lengths": [6], "runs": 5, "threads": 1}
    words, folder = load_tokenizer(stories), tmp_path_factory.mktemp("graph") / "onnx"
    result = export_model(model, words, folder, task=None, max_length=40, **options)
    session = open_graph(result.folder, threads=1)
    assert isinstance(session, OnnxDecoder)
    return model, result, session


def test_one_graph_reads_prompts_and_one_token_after_another(exported: tuple[Any, ExportResult, OnnxDecoder]):
    model, result, session = exported
    assert result.maker == "kdcli" and result.parity.agreement == 1.0
    assert result.parity.tolerance is not None and result.difference < result.parity.tolerance / 5
    graph = onnx.load(str(result.folder / "model.onnx"))
    assert [one.version for one in graph.opset_import if not one.domain] == [23]
    # Grouped heads stay grouped, in one operator a block; the weights are there once.
    assert result.operators["Attention"] == 5 and result.operators.get("Expand", 0) <= 3
    assert result.megabytes < 1.6
    dims = {
        node.name: [dim.dim_param or dim.dim_value for dim in node.type.tensor_type.shape.dim]
        for node in graph.graph.input
    }
    assert dims["past_key_values.0.key"] == ["batch", 4, "past_sequence", 8]
    assert dims["input_ids"] == ["batch", "sequence"]
    # Of a batch padded on either side, all logits.
    ids, mask = torch.randint(3, 500, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    for side in (slice(0, 4), slice(5, 9)):
        mask[1] = 1
        mask[1, side] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            own = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        found = session(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(found[mask.bool()], own[mask.bool()], atol=1e-4, rtol=0)


def test_it_writes_what_the_model_writes(exported: tuple[Any, ExportResult, OnnxDecoder]):
    model, _, session = exported
    assert generate(session, PROMPTS, **KEYS) == generate(model, PROMPTS, **KEYS)
    assert draws(session) == draws(session, batch_size=1) == draws(model)
    assert draws(session) != generate(session, PROMPTS, sampling=GREEDY, **KEYS)


def test_the_script_beside_it_writes_as_kdcli_does(stories: Path, exported: tuple[Any, ExportResult, OnnxDecoder]):
    model, result, session = exported
    rows = dataset_of(pa.table({"text": ["once upon a time", "lily and tom"]}))
    for one in (model, session):
        found = answers_of_script(result.folder, rows["text"])
        kept = CAUSAL.replies(one, rows, load_tokenizer(stories), max_length=40, batch_size=2)
        assert [reply["continuation"] for reply in kept] == [reply["continuation"] for reply in found]
    assert len(kept[0]["continuation"]) > 40
    # A prompt as long as a text may be.
    found = answers_of_script(
        result.folder, ["once upon a time " * 30], said="no room for a continuation: the prompt has"
    )
    assert found == [{"continuation": ""}]


@pytest.mark.slow
def test_the_script_writes_prompts_in_their_layout(tmp_path: Path):
    words, rows = small_tokenizer(), [[{"role": "user", "content": text}] for text in ("Name a bird.", "Name a tree.")]
    model = small_model(words)
    export_decoder(plain_copy(model), words, tmp_path)
    turn, last = "<s>{{ m.role }}: {{ m.content }}</s>", "{% if add_generation_prompt %}<s>{% endif %}"
    chat = "{% for m in messages %}" + turn + "{% endfor %}" + last
    for system, template in ((None, None), ("Be brief.", None), (None, chat), ("Be brief.", chat)):
        words.chat_template = template
        kind = INSTRUCT.with_fields(fields := InstructFields(system=system, max_new_tokens=9))
        script = script_of(kind, fields, model.config, words, 200)
        assert script is not None and "INSTRUCTION ..." in script
        (tmp_path / "predict.py").write_text(script, encoding="utf-8")
        found = answers_of_script(tmp_path, [row[0]["content"] for row in rows])
        turns = [[{"role": "system", "content": system}] * bool(system) + row for row in rows]
        read = kind.read_inputs({"messages": Column.of(turns)}, InstructFields(messages="messages"), "rows", [])
        kept = kind.replies(model, dataset_of(read), words, max_length=200, batch_size=2, writing=Writing(9))
        assert [reply["response"] for reply in kept] == [reply["response"] for reply in found]


def test_the_first_token_and_the_next_ones_are_timed(exported: tuple[Any, ExportResult, OnnxDecoder]):
    model, result, session = exported
    assert result.latency is not None
    rows = {(row["backend"], row["what"]): row for row in json.loads(json.dumps(result.latency.to_json()))["rows"]}
    assert set(rows) == {(backend, what) for backend in ("PyTorch", "ONNX Runtime") for what in (FIRST, NEXT)}
    for row in rows.values():
        assert row["runs"] == 5 and (row["batch"], row["sequence"]) == (2, 6) and 0 < row["p50"] <= row["p99"]
    # Two tokens at a time.
    step = rows["ONNX Runtime", NEXT]
    assert 1000 * 2 / step["p99"] <= step["throughput"] <= 1000 * 2 / step["fastest"]
    assert result.latency.of("student", "PyTorch", 2, 6) == rows["PyTorch", NEXT]
    # Where positions end, fewer tokens are written, and after the last position none.
    full = measure(
        {"m": (model, session)},
        batch_sizes=[1],
        sequence_lengths=[512],
        threads=1,
        runs=1,
        vocab_size=500,
        contest=texts,
    )
    assert [row["what"] for row in full.rows] == [FIRST, FIRST]


def test_a_graph_of_another_model_is_not_kept(
    exported: tuple[Any, ExportResult, OnnxDecoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, _, session = exported
    other = plain_copy(model)
    with torch.no_grad():
        other.model.layers[4].self_attn.k_proj.weight[0] += 0.02
    found = text_parity(other, session, [[1, 5, 7, 9, 11], [1, 30]])
    assert found.difference > 1e-4 * found.scale
    monkeypatch.setattr(export_module, "export_decoder", lambda *_, **__: None)
    monkeypatch.setattr(export_module, "open_graph", lambda *_, **__: session)
    with pytest.raises(GateError, match="logits of the exported graph differs from PyTorch's"):
        export_model(other, tokenizer(), tmp_path / "out", task=None, latency=False)
    assert not list(tmp_path.iterdir())


def test_what_a_graph_can_be_is_said_before_it_is_made(stories: Path, tmp_path: Path):
    model, words = load_model(stories), tokenizer()
    for options, message in (
        ({"builder": "kdcli", "precision": "int4"}, "kdcli's own graph is of fp32, not int4"),
        ({"builder": "genai"}, "needs head sizes that are multiples of 16, not 8|is not installed"),
        ({"precision": "fp16"}, "needs head sizes that are multiples of 16, not 8|is not installed"),
        ({"opset": 22}, "a graph with a key-value cache needs opset 23, not 22"),
    ):
        with pytest.raises(InputError, match=message):
            export_model(model, words, tmp_path / "out", task=None, latency=False, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="int4 is for causal language models"):
        export_model(tiny("bert"), words, tmp_path / "out", task=None, latency=False, precision="int4")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("family", DECODERS)
def test_every_familys_graph_writes_what_the_model_writes(family: str, tmp_path: Path):
    # Windows of 4 or 5 tokens are shorter than what is read and written.
    model = tiny(family)
    export_decoder(plain_copy(model), tokenizer(), tmp_path)
    session = open_graph(tmp_path, threads=1)
    assert isinstance(session, OnnxDecoder)
    found = text_parity(model, session, [list(range(5, 45)), [1, 30, 7], [8]])
    assert found.difference < 1e-5 * found.scale and found.agreement == 1.0
    assert generate(session, PROMPTS, **KEYS) == generate(model, PROMPTS, **KEYS)


@pytest.mark.slow
def test_low_rank_factors_stay_factors(stories: Path, exported: tuple[Any, ExportResult, OnnxDecoder], tmp_path: Path):
    student = build_student(
        load_model(stories), StudentSection(form="low-rank", rank=8, embedding_rank=16), seed=0
    ).model
    assert any(isinstance(module, LowRankLinear) for module in student.modules())
    result = export_model(student, tokenizer(), tmp_path / "onnx", task=None, latency=False)
    assert result.maker == "kdcli" and result.parity.agreement == 1.0
    assert result.megabytes < 0.6 * exported[1].megabytes
    assert generate(open_graph(result.folder), PROMPTS, **KEYS) == generate(student, PROMPTS, **KEYS)


def large(family: str = "llama", **extra: Any) -> Any:
    """Return a model that the builder takes, but for its window."""
    return tiny(family, hidden=64, **({"head_dim": 16} if FAMILIES[family].sizes.head else {}), **extra)


WINDOWS = [name for name in DECODERS if "sliding_window" in EXTRA.get(name, {})]
FAILING = {"gemma2", "gemma3_text", "phi3", "qwen2"}
"""Families of which the builder knows the tiny models here, and its graphs fail: a window of 260 wants such a cache."""


def test_the_builder_gets_no_model_with_windows():
    for family in WINDOWS:
        model = large(family)
        reason, _ = obstacle(model) or ("", None)
        assert f"window of {model.config.sliding_window} tokens" in reason
        assert not Form().by_builder(model, CAUSAL_LM)
        with pytest.raises(InputError, match="window"):
            Form(precision="int4").by_builder(model, CAUSAL_LM)
        # One that is as long as the positions hides nothing.
        model.config.sliding_window = model.config.max_position_embeddings
        assert "window" not in (obstacle(model) or ("", None))[0]


@pytest.mark.slow
@pytest.mark.skipif(obstacle(large()) is not None, reason="needs kdcli[llm]")
@pytest.mark.parametrize("family", DECODERS)
def test_the_builders_graph_writes_what_the_model_writes(family: str, tmp_path: Path):
    # The builder asks for an end token.
    model = large(family, eos_token_id=2, **({"sliding_window": 260} if family in WINDOWS else {}))
    built = obstacle(model) is None
    result = export_model(model, tokenizer(), tmp_path / "onnx", task=None, latency=False)
    assert (result.maker == "ONNX Runtime GenAI") == (built and family not in FAILING)
    assert any("that of ONNX Runtime GenAI failed" in note for note in result.notes) == (family in FAILING)
    assert result.parity.tolerance is not None and result.difference < result.parity.tolerance
    session = open_graph(result.folder)
    # Batches of texts of several lengths, in one cache that is written in place.
    assert generate(session, PROMPTS, **KEYS) == generate(model, PROMPTS, **KEYS)
    assert draws(session) == draws(session, batch_size=1) == draws(model)


@pytest.mark.slow
@pytest.mark.skipif(obstacle(large()) is not None, reason="needs kdcli[llm]")
@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_fewer_bits_are_told_from_a_fault(precision: Any, tmp_path: Path):
    student = build_student(large(), StudentSection(form="low-rank", rank=8), seed=0).model
    result = export_model(student, tokenizer(), tmp_path / "onnx", task=None, latency=False, precision=precision)
    # Other numbers, no gate, and how often the most probable token is the same; factors are merged, and that is said.
    assert result.gates == [] and result.parity.tolerance is None
    assert result.difference > 1e-5 and result.parity.agreement > {"fp16": 0.97, "int8": 0.8, "int4": 0.3}[precision]
    assert any("merged" in note for note in result.notes)
    assert any("many texts will differ" in note for note in result.notes) == (result.parity.agreement < 0.9)
    assert len(generate(open_graph(result.folder), PROMPTS, **KEYS)) == len(PROMPTS)
