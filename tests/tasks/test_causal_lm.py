"""Plain text that is continued token by token: blocks, batches, losses, and a run."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import small_decoder
import torch
from tiny_recipes import run_recipe, write_recipe

from kdcli.cli.app import run
from kdcli.errors import InputError
from kdcli.evaluation.score import evaluate_model
from kdcli.models.load import load_model, load_tokenizer
from kdcli.objectives.distribution import Categorical
from kdcli.objectives.gold import gold_loss
from kdcli.recipe.schema import EvaluateSection, TaskSection
from kdcli.tasks.causal_lm import KIND
from kdcli.tasks.heads import kind_of_model
from kdcli.tasks.load import load_task

WORDS = small_decoder.tokenizer()
TEXTS = [
    f"{row['instruction']} {row['response']}. " * (1 + number % 4) for number, row in enumerate(small_decoder.ROWS)
]
RECIPE: dict[str, Any] = {
    "method": "kd",
    "task": {"name": "own", "type": "causal-lm", "train": "train.jsonl", "validation": "held.jsonl", "max_length": 48},
    "teacher": {"model": "teacher"},
    "student": {"form": "depth", "layers": 1},
    "train": {"max_steps": 2, "batch_size": 4, "precision": "fp32", "device": "cpu"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_decoder.write_world(tmp_path)
    for name, texts in (("train.jsonl", TEXTS), ("held.jsonl", TEXTS[:7])):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    write_recipe(tmp_path / "recipe.toml", RECIPE)
    return tmp_path


def loaded(folder: Path, **task: Any) -> Any:
    section = TaskSection(**{**RECIPE["task"], **task})
    return load_task(section, EvaluateSection(), base=folder)


def library_loss(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """Return the library's own mean over all tokens that have a label."""
    with torch.no_grad():
        return float(model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss)


def test_documents_are_packed_with_the_end_of_text_between_them(folder: Path):
    task = loaded(folder)
    blocks = KIND.encode(task.train, WORDS, 48)
    ids = [token for row in blocks for token in row["input_ids"]]
    assert WORDS.decode(ids).split("</s>") == TEXTS
    assert [len(row["input_ids"]) for row in blocks][:-1] == [48] * (len(blocks) - 1)
    assert KIND.token_counts(blocks).tolist() == [[n - 1, n] for n in blocks["length"]]


def test_every_token_but_the_first_of_a_row_is_predicted_from_the_one_before():
    rows = [
        {"index": n, "input_ids": list(range(5, 5 + size)), "attention_mask": [1] * size}
        for n, size in enumerate((3, 1, 6))
    ]
    batch = KIND.collator(WORDS)(rows)
    assert batch["input_ids"].shape == batch["labels"].shape == (3, 8)
    assert batch["predicted_positions"].tolist() == [0, 1, 16, 17, 18, 19, 20]
    assert batch["targets"].tolist() == [6, 7, 6, 7, 8, 9, 10]
    labelled = batch["labels"] != -100
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])
    assert labelled.sum(1).tolist() == [2, 0, 5]
    real, predicted = batch["real_positions"], batch["predicted_positions"]
    assert torch.equal(real[batch["predicted_among_real"]], predicted) and len(real) == 10
    assert batch["prediction_weights"].sum() == batch["example_weights"].sum() == 1.0


def test_predictions_give_the_loss_of_the_library_at_labels_and_everywhere(folder: Path):
    model, blocks = small_decoder.model(WORDS), KIND.encode(loaded(folder).train, WORDS, 48)
    batch = KIND.collator(WORDS)([blocks[place] for place in (0, len(blocks) - 1)])
    with torch.no_grad():
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    expected = library_loss(model, batch)
    for everywhere in (False, True):
        table = KIND.predictions(output, batch, everywhere=everywhere)
        assert len(table[0].logits) == len(KIND.positions(batch, everywhere=everywhere))
        assert table[0].weights.sum().item() == pytest.approx(1.0)
        assert float(gold_loss(table, Categorical())) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_is_of_all_tokens_not_of_batches(folder: Path, batch_size: int):
    task, model = loaded(folder), small_decoder.model(WORDS)
    [found] = evaluate_model(model, WORDS, task, batch_size=batch_size, max_length=48).values()
    blocks = KIND.encode(task.selection, WORDS, 48)
    batch = KIND.collator(WORDS)([blocks[place] for place in range(len(blocks))])
    assert len(set(blocks["length"])) > 1
    assert found["perplexity"] == pytest.approx(math.exp(library_loss(model, batch)), rel=1e-5)
    with torch.no_grad():
        best = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    kept = batch["labels"][:, 1:] != -100
    assert found["accuracy"] == pytest.approx(float((best[:, :-1] == batch["labels"][:, 1:])[kept].float().mean()))


def test_a_run_distils_scores_and_is_scored_again(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    record = run_recipe(folder / "recipe.toml")
    teacher, student = (record[side]["metrics"]["validation"] for side in ("teacher", "student"))
    history = record["training"][0]["history"]
    assert {"output", "task"} <= set().union(*history) and record["retention"] == pytest.approx(
        teacher["perplexity"] / student["perplexity"]
    )
    monkeypatch.chdir(folder)
    assert run(["eval", "runs/recipe", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["metrics"]["validation"]["perplexity"] == pytest.approx(student["perplexity"], rel=1e-4)
    # The same text from a file, under another name.
    (folder / "other.jsonl").write_text("".join(json.dumps({"story": text}) + "\n" for text in TEXTS[:7]))
    assert run(["eval", "runs/recipe", "--data", "other.jsonl", "--text", "story", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["metrics"]["rows"]
    assert rows["perplexity"] == pytest.approx(student["perplexity"], rel=1e-4)
    card = (folder / "runs" / "recipe" / "student" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and "perplexity" in card and "less is better" in card


def test_a_tokenizer_without_padding_pads_with_its_end_of_text_and_keeps_its_size(tmp_path: Path):
    bare = small_decoder.tokenizer()
    bare.pad_token = None
    small_decoder.model(WORDS).save_pretrained(tmp_path)
    bare.save_pretrained(tmp_path)
    words = load_tokenizer(tmp_path)
    assert words.pad_token_id == words.eos_token_id and len(words) == len(bare)
    batch = KIND.collator(words)([{"index": n, "input_ids": [5] * n, "attention_mask": [1] * n} for n in (2, 9)])
    # What pads is never predicted, although the end of a text is.
    assert len(batch["targets"]) == 9 and (batch["targets"] == 5).all()


def test_models_with_one_head_are_for_instructions_where_they_have_a_chat_template(tmp_path: Path):
    model, words = small_decoder.model(WORDS), small_decoder.tokenizer()
    assert kind_of_model(model, "it", "MODEL", processor=words).name == "causal-lm"
    words.chat_template = "{{ messages }}"
    assert kind_of_model(model, "it", "MODEL", processor=words).name == "instruct"
    assert kind_of_model(model, "it", "MODEL", processor=words, usual="causal-lm").name == "causal-lm"
    assert kind_of_model(model, "it", "MODEL", processor=words, wanted="causal-lm").name == "causal-lm"
    with pytest.raises(InputError, match="is not one for classification"):
        kind_of_model(model, "it", "MODEL", processor=words, wanted="classification")
    model.save_pretrained(tmp_path)
    assert type(load_model(tmp_path, KIND.head)).__name__ == "LlamaForCausalLM"
