"""What a teacher said before is what it would say now, to the bit, or it is asked again."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from datasets import Dataset
from families import tiny, tokenizer
from rich.console import Console
from safetensors import safe_open
from training.stages import rows

from kdcli.evaluation.score import evaluate_model
from kdcli.models.finite import NotFiniteError
from kdcli.models.hashing import hash_of_dataset
from kdcli.recipe.schema import EvaluateSection, TaskSection
from kdcli.tasks.encode import Collator, encode
from kdcli.tasks.load import load_task
from kdcli.tasks.predict import predict
from kdcli.training import teacher_cache as logits_cache
from kdcli.training.teacher_cache import KnownOutputs, cached_predictions, known_outputs

WORDS = tokenizer()
COLLATOR = Collator(WORDS)


class Asked(AssertionError):
    """The teacher ran although its answers were kept."""


def ask(teacher: Any, data: Dataset, **options: Any) -> torch.Tensor:
    return known_outputs(teacher, data, COLLATOR, batch_size=8, **options).tables["logits"]


def kept(cache: Path) -> list[Path]:
    return sorted((cache / "logits").glob("*"))


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """From the moment that this is applied every forward pass of a whole data set is an error."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise Asked

    monkeypatch.setattr(logits_cache, "predict", refuse)
    return monkeypatch


def test_kept_logits_equal_a_fresh_pass_to_the_bit(own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    teacher, data = tiny("bert"), rows(21)
    fresh = torch.from_numpy(predict(teacher, data, COLLATOR, batch_size=8)["logits"])
    first = ask(teacher, data)
    monkeypatch.setattr(logits_cache, "predict", None)
    second = ask(teacher, data)
    assert torch.equal(first, fresh) and torch.equal(second, fresh)
    assert second.dtype == torch.float32 and second.shape == (21, 2)
    assert len(kept(own_cache)) == 1


def test_a_row_belongs_to_its_index_in_whatever_order_the_indices_come():
    teacher = tiny("bert")
    data = rows(5)
    shuffled = Dataset.from_dict({**{k: data[k] for k in data.column_names if k != "index"}, "index": [7, 2, 0, 9, 4]})
    in_order = torch.from_numpy(predict(teacher, data, COLLATOR, batch_size=8)["logits"])
    for _ in range(2):
        table = ask(teacher, shuffled)
        assert table.shape == (10, 2)
        assert torch.equal(table[[7, 2, 0, 9, 4]], in_order)


def test_another_order_of_the_same_rows_gives_the_same_table():
    teacher, data = tiny("bert"), rows(12)
    order = [5, 3, 11, 0, 7, 1, 2, 10, 4, 9, 6, 8]
    torch.testing.assert_close(ask(teacher, data.select(order)), ask(teacher, data))


def test_another_teacher_is_another_file(own_cache: Path):
    data = rows(6)
    first = ask(tiny("bert"), data)
    nudged = tiny("bert")
    with torch.no_grad():
        nudged.classifier.bias[0] += 1.0
    second = ask(nudged, data)
    assert len(kept(own_cache)) == 2
    torch.testing.assert_close(second - first, torch.tensor([[1.0, 0.0]] * 6))


@pytest.mark.parametrize(
    "change",
    [{"num_attention_heads": 2}, {"hidden_act": "relu"}, {"layer_norm_eps": 0.1}],
    ids=lambda change: next(iter(change)),
)
def test_the_same_weights_in_another_architecture_are_another_teacher(own_cache: Path, change: dict[str, Any]):
    data = rows(6)
    one, other = tiny("bert"), tiny("bert", **change)
    other.load_state_dict(one.state_dict())
    ask(one, data)
    expected = torch.from_numpy(predict(other, data, COLLATOR, batch_size=8)["logits"])
    assert torch.equal(ask(other, data), expected)
    assert not torch.equal(ask(one, data), expected)
    assert len(kept(own_cache)) == 2


def test_where_a_model_came_from_and_what_its_classes_are_called_does_not_matter(own_cache: Path):
    data = rows(6)
    named = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}, "name_or_path": "elsewhere"}
    assert torch.equal(ask(tiny("bert"), data), ask(tiny("bert", **named), data))
    assert len(kept(own_cache)) == 1


@pytest.mark.parametrize("what", ["text", "max_length", "pair"])
def test_another_input_is_another_file(own_cache: Path, what: str):
    teacher = tiny("bert")
    columns = {"index": [0, 1], "text": ["the film was dull", "the plot was fresh and witty"], "label": [0, 1]}
    ask(teacher, encode(Dataset.from_dict(columns), WORDS, 16))
    if what == "text":
        columns["text"] = ["the film was dull", "the plot was fresh and clever"]
    if what == "pair":
        columns["text_pair"] = ["the end", "the end"]
    data = encode(Dataset.from_dict(columns), WORDS, 5 if what == "max_length" else 16)
    again = ask(teacher, data)
    assert len(kept(own_cache)) == 2
    assert torch.equal(again, torch.from_numpy(predict(teacher, data, COLLATOR, batch_size=8)["logits"]))


def test_labels_do_not_matter_to_what_a_teacher_says(own_cache: Path):
    teacher, data = tiny("bert"), rows(6)
    ask(teacher, data)
    ask(teacher, data.remove_columns("labels").add_column("labels", [1] * 6))
    assert len(kept(own_cache)) == 1


DAMAGE = (
    *("garbage", "torn", "empty", "a folder", "short", "a class less", "another name", "another file"),
    *("one bit", "one float", "not a number", "its own hash"),
)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_cannot_be_used_is_made_again_with_a_note(
    own_cache: Path, damage: str, nothing_runs: pytest.MonkeyPatch
):
    teacher, data = tiny("bert"), rows(6)
    with nothing_runs.context() as patch:
        patch.setattr(logits_cache, "predict", predict)
        expected = ask(teacher, data)
    [path] = kept(own_cache)
    whole = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()

    def rewrite(logits: torch.Tensor, name: str = "logits") -> None:
        safetensors.torch.save_file({name: logits.contiguous()}, path, metadata)

    other = expected.clone()
    if damage == "one float":
        other[2, 1] += 0.5
        rewrite(other)
    elif damage == "not a number":
        other[0, 0] = torch.nan
        rewrite(other)
    elif damage == "a class less":
        rewrite(expected[:, :1])
    elif damage == "another file":
        with nothing_runs.context() as patch:
            patch.setattr(logits_cache, "predict", predict)
            ask(tiny("bert", seed=3), data)
        [second] = [file for file in kept(own_cache) if file != path]
        second.replace(path)
    elif damage == "one bit":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "its own hash":
        place = whole.index(b"sha256") + 20
        path.write_bytes(whole[:place] + (b"0" if whole[place : place + 1] != b"0" else b"1") + whole[place + 1 :])
    elif damage == "garbage":
        path.write_bytes(b"\x00" * 100)
    elif damage == "torn":
        path.write_bytes(whole[:-5])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "short":
        rewrite(expected[:3])
    elif damage == "another name":
        rewrite(expected, "predictions")
    else:
        path.unlink()
        path.mkdir()
    output = io.StringIO()
    with pytest.raises(Asked):
        ask(teacher, data, console=Console(file=output, width=400))
    assert str(path) in output.getvalue() and "is made again" in output.getvalue()
    nothing_runs.setattr(logits_cache, "predict", predict)
    assert torch.equal(ask(teacher, data), expected)
    if damage != "a folder":
        assert path.read_bytes() == whole
    assert kept(own_cache) == [path]


@pytest.mark.parametrize("obstacle", ["a file in its place", "a full disk"])
def test_a_cache_that_cannot_be_written_does_not_end_the_run(
    own_cache: Path, obstacle: str, monkeypatch: pytest.MonkeyPatch
):
    teacher, data = tiny("bert"), rows(200)
    if obstacle == "a full disk":
        resource = pytest.importorskip("resource")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
        try:
            logits = ask(teacher, data)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert kept(own_cache) == []
    else:
        (own_cache / "logits").write_text("in the way")
        logits = ask(teacher, data)
    assert torch.equal(logits, torch.from_numpy(predict(teacher, data, COLLATOR, batch_size=8)["logits"]))


def predict_nothing(model: Any, dataset: Dataset, *arguments: Any, **options: Any) -> Any:
    return {"logits": np.zeros((len(dataset), 2), dtype=np.float32)}


def test_without_the_cache_nothing_is_read_and_nothing_is_kept(own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    teacher, data = tiny("bert"), rows(6)
    expected = ask(teacher, data, use_cache=False)
    assert kept(own_cache) == []
    ask(teacher, data)
    monkeypatch.setattr(logits_cache, "predict", predict_nothing)
    assert torch.equal(ask(teacher, data), expected)
    assert torch.equal(ask(teacher, data, use_cache=False), torch.zeros(6, 2))


def test_a_teachers_scores_come_from_what_was_kept(own_cache: Path, nothing_runs: pytest.MonkeyPatch):
    teacher, task = tiny("bert"), load_task(TaskSection(name="reviews"), EvaluateSection(), base=Path())
    direct = evaluate_model(teacher, WORDS, task)
    with nothing_runs.context() as patch:
        patch.setattr(logits_cache, "predict", predict)
        assert evaluate_model(teacher, WORDS, task, ask=cached_predictions) == direct
    assert evaluate_model(teacher, WORDS, task, ask=cached_predictions) == direct
    with pytest.raises(Asked):
        evaluate_model(teacher, WORDS, task, ask=cached_predictions, max_length=5)


def test_logits_that_are_no_numbers_are_an_error_and_never_kept(own_cache: Path):
    teacher, data = tiny("bert"), rows(6)
    with torch.no_grad():
        teacher.classifier.bias[1] = torch.nan
    with pytest.raises(NotFiniteError, match="the logits of the teacher contain NaN or inf"):
        ask(teacher, data)
    assert kept(own_cache) == []


def test_outputs_of_tokens_come_back_in_the_order_of_a_batch():
    lengths = [3, 5, 2]
    rows_of = [torch.randn(n, 4) for n in lengths]
    known = KnownOutputs({"logits": torch.cat(rows_of)}, starts=torch.tensor([0, 3, 8]))
    batch = {"index": torch.tensor([2, 0]), "input_ids": torch.zeros(2, 8)}
    found = known.of(batch).logits
    assert found.shape == (2, 8, 4)
    assert torch.equal(found[0, :2], rows_of[2]) and torch.equal(found[1, :3], rows_of[0])


def test_features_of_one_index_are_refused():
    data = rows(4)
    twice = Dataset.from_dict({**{k: data[k] for k in data.column_names if k != "index"}, "index": [0, 0, 1, 2]})
    with pytest.raises(ValueError, match="one index"):
        ask(tiny("bert"), twice)


@pytest.mark.parametrize("column", ["input_ids", "attention_mask", "pixel_values"])
def test_the_cache_is_named_by_every_input(column: str):
    data = Dataset.from_dict({"index": [0, 1], column: [[1, 0], [1, 1]], "labels": [0, 1], "length": [2, 2]})
    other = Dataset.from_dict({"index": [0, 1], column: [[1, 1], [1, 1]], "labels": [0, 1], "length": [2, 2]})
    labelled = Dataset.from_dict({**{k: data[k] for k in data.column_names}, "labels": [1, 1]})
    assert hash_of_dataset(data) != hash_of_dataset(other)
    assert hash_of_dataset(data) == hash_of_dataset(labelled)
