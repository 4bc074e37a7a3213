"""Methods of more than the prediction where an example has several predictions: spans of contexts, tags of words."""

import json
from pathlib import Path
from typing import Any

import pytest
from families import tokenizer
from tiny_recipes import run_recipe, tiny_recipe, write_recipe
from transformers import BertConfig, BertForMaskedLM

from kdcli.cli.app import run
from kdcli.methods import registry
from kdcli.models.save import save_model
from kdcli.tasks import registry as kinds

WORDS = ["the", "film", "was", "dull", "but", "its", "plot", "seemed", "really", "gripping"]
METHODS: dict[str, dict[str, Any]] = {
    "adkd": {"steps": 2, "top_k": 20},
    "lgtm": {"zero_classifiers": True, "held_out": 0.2},
    "theseus": {"full_at": 1.0},
}


def _question(row: int) -> dict[str, Any]:
    words = [WORDS[(row + place * (row % 3 + 1)) % 10] for place in range(24)]
    first = len(" ".join([*words[: row % 24], ""]))
    question = {"question": f"what was {WORDS[row % 10]}", "context": " ".join(words)}
    return {**question, "answer": words[row % 24], "answer_start": first}


def _tagged(row: int) -> dict[str, Any]:
    words = [WORDS[(row + place * (row % 3 + 1)) % 10] for place in range(24)]
    return {"tokens": words, "tags": [f"{word[0]}-word" for word in words]}


DATA = {
    "question-answering": (_question, {"max_length": 24, "stride": 4}),
    "token-classification": (_tagged, {"max_length": 16, "stride": 4}),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows of both kinds, each longer than a window, and their recipes."""
    folder = tmp_path_factory.mktemp("several")
    for kind, (row, fields) in DATA.items():
        for name, rows in (("train", range(24)), ("held", range(24, 32))):
            text = "".join(json.dumps(row(number)) + "\n" for number in rows)
            (folder / f"{kind}-{name}.jsonl").write_text(text)
        files = {"train": f"{kind}-train.jsonl", "validation": f"{kind}-held.jsonl"}
        task = {"name": "own", "type": kind, **files, **fields}
        write_recipe(folder / f"{kind}.toml", tiny_recipe("task", task=task, train={"max_steps": 2}))
    return folder


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        pytest.param(kind, method, marks=[] if method == "adkd" else pytest.mark.slow)
        for kind in DATA
        for method in METHODS
    ],
)
def test_it_trains_a_student_on_windows(kind: str, method: str, world: Path):
    options = [f"method.{name}={json.dumps(value)}" for name, value in METHODS[method].items()]
    document = run_recipe(world / f"{kind}.toml", f"method={method}", *options, output=world / f"{kind}-{method}")
    history = [entry for entry in document["training"][0]["history"] if "loss" in entry]
    assert history and all(entry["loss"] > 0 for entry in history)
    if method == "adkd":
        assert all(0 < entry["attribution"] < 4 for entry in history)
    assert 0 <= document["student"]["score"] <= 1


@pytest.mark.slow
def test_a_student_of_tags_is_trained_on_copies_with_other_words_too(world: Path, tmp_path: Path):
    config = BertConfig(
        vocab_size=220, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    save_model(BertForMaskedLM(config), tmp_path, tokenizer())
    augment = f'task.augment={{model="{tmp_path}", copies=2, stop_words=[]}}'
    document = run_recipe(world / "token-classification.toml", augment, output=world / "augmented")
    assert document["task"]["augment"]["added"] == 2 * document["task"]["augment"]["rows"] == 48


@pytest.mark.parametrize("kind", DATA)
def test_each_kind_says_which_methods_fit(kind: str, world: Path, capsys: Any):
    fitting = {name for name in registry.names() if kind in kinds.providing(registry.get(name).needs)}
    assert fitting == set(registry.names()) - {"dbkd", "od"} - OF_OTHERS
    assert run(["distill", str(world / f"{kind}.toml"), "--dry-run", "--set", "method=dbkd"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "dbkd works on classification and image-classification tasks: it needs one class out of several" in error
    assert f"own is a {kind} task" in error and "use kd, makd, hs" in error


def test_words_of_a_context_are_not_replaced_under_its_answer(world: Path, capsys: Any):
    recipe = str(world / "question-answering.toml")
    assert run(["distill", recipe, "--dry-run", "--set", 'task.augment={model="x"}']) == 2
    assert "augment needs texts that keep their answers where words change" in capsys.readouterr().err


OF_OTHERS = {name for name in registry.names() if registry.get(name).needs & {"embedding", "prompts"}}
