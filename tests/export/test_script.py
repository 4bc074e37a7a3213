"""The script beside an exported graph: short, without any library but ONNX Runtime and tokenizers, and right."""

import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny, tokenizer
from scripts import answers_of_script
from transformers import AutoModelForQuestionAnswering, AutoModelForTokenClassification

from kdcli.data.columns import Column
from kdcli.data.tables import dataset_of
from kdcli.export.export import export_model
from kdcli.export.script import script_of
from kdcli.models.heads import with_new_head
from kdcli.models.save import save_model
from kdcli.models.sentence_folder import PROMPTS
from kdcli.tasks import registry
from kdcli.tasks.heads import load_model
from kdcli.tasks.kind import TaskKind
from kdcli.tasks.predict import predict

TEXTS = ["a fine film", "a dull film , and so long that it is cut in the end , after many words", "dark"]
LENGTH = 16


def replies(
    kind: TaskKind,
    fields: Any,
    model: Any,
    columns: Mapping[str, Sequence[Any]],
    *,
    words: Any = None,
    length: int = LENGTH,
) -> list[dict[str, Any]]:
    """Return what kdcli answers with the PyTorch model."""
    rows = kind.read_inputs({name: Column.of(values) for name, values in columns.items()}, fields, "here", [])
    return kind.replies(model, dataset_of(rows), words or tokenizer(), max_length=length, ask=predict)


def splits_bytes() -> Any:
    """Return a small tokenizer that splits bytes, and tells a word by the space before it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=215, special_tokens=special, initial_alphabet=alphabet[:120])
    found.train_from_iterator(TEXTS * 3, trainer)
    pairs = [("</s>", 2), ("<s>", 1)]
    found.post_processor = processors.RobertaProcessing(*pairs, trim_offsets=True, add_prefix_space=False)
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=found, cls_token="<s>", sep_token="</s>", model_max_length=128, **names
    )


def near(value: Any) -> Any:
    """Return a value to compare with, whose numbers may be a little different."""
    if isinstance(value, Mapping):
        return {key: near(part) for key, part in value.items()}
    if isinstance(value, float) or (isinstance(value, list) and value and isinstance(value[0], float)):
        return pytest.approx(value, abs=1e-5)
    return value


MODELS: dict[str, Any] = {
    "classification": {"id2label": {0: "no", 1: "so", 2: "yes"}, "labels": 3},
    "regression": {"labels": 1},
    "multi-label": {
        "id2label": {0: "joy", 1: "fear", 2: "anger"},
        "labels": 3,
        "problem_type": "multi_label_classification",
        "kdcli_thresholds": [0.3, 0.6, 0.5],
    },
}


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("classification", "bert"),
        pytest.param("regression", "roberta", marks=pytest.mark.slow),
        pytest.param("multi-label", "distilbert", marks=pytest.mark.slow),
    ],
)
def test_the_script_answers_texts_as_kdcli_does(name: str, family: str, tmp_path: Path):
    kind, model = registry.get(name), tiny(family, layers=1, **MODELS[name])
    result = export_model(model, tokenizer(), tmp_path / "out", task=None, max_length=LENGTH, latency=False)
    assert result.to_json()["script"] == "predict.py"
    found = answers_of_script(tmp_path / "out", TEXTS)
    assert found == [near(reply) for reply in replies(kind, kind.fields(), model, {"text": TEXTS})]
    assert len({json.dumps(reply) for reply in found}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("always", [True, False])
def test_the_script_finds_answers_in_all_windows_of_a_context(family: str, always: bool, tmp_path: Path):
    base = registry.get("question-answering")
    fields = base.fields(stride=4, max_answer=5)
    kind = base.with_fields(fields)
    torch.manual_seed(1)
    model = AutoModelForQuestionAnswering.from_config(tiny(family, layers=1).config).eval()
    with torch.no_grad():
        model.qa_outputs.weight.mul_(20.0)
    rows = [(question, context) for question in ("a film ?", "so ?") for context in [*TEXTS, " ".join(TEXTS * 3)]]
    questions, contexts = zip(*rows, strict=True)
    if not always:
        read = kind.read_inputs({"question": Column.of(questions), "context": Column.of(contexts)}, fields, "", [])
        margins = kind.answers(model, dataset_of(read), tokenizer(), max_length=LENGTH, ask=predict).margins
        model.config.kdcli_no_answer_threshold = float(sorted(margins)[3] + sorted(margins)[4]) / 2
    result = export_model(model, tokenizer(), tmp_path / "out", task=None, max_length=LENGTH, latency=False)
    assert result.script is not None
    script = script_of(kind, fields, model.config, tokenizer(), LENGTH)
    assert script is not None and "stride=4" in script and "k=4" in script
    (tmp_path / "out" / "predict.py").write_text(script)
    found = answers_of_script(tmp_path / "out", [text for row in rows for text in row])
    expected = replies(kind, fields, model, {"question": questions, "context": contexts})
    assert [row["answer"] for row in found] == [reply["answer"] for reply in expected]
    for row, reply in zip(found, expected, strict=True):
        if reply["answer"]:
            assert (row["start"], row["end"]) == (reply["start"], reply["end"])
    assert len({row["answer"] for row in found}) > 3
    assert sum(reply["start"] is None for reply in expected) == (0 if always else 4)


@pytest.mark.slow
def test_the_script_cuts_a_question_that_leaves_no_room_for_the_context(tmp_path: Path):
    base = registry.get("question-answering")
    fields = base.fields(stride=5)
    kind = base.with_fields(fields)
    torch.manual_seed(1)
    model = AutoModelForQuestionAnswering.from_config(tiny("bert", layers=1).config).eval()
    with torch.no_grad():
        model.qa_outputs.weight.mul_(20.0)
    export_model(model, tokenizer(), tmp_path / "out", task=None, max_length=LENGTH, latency=False)
    script = script_of(kind, fields, model.config, tokenizer(), LENGTH)
    assert script is not None and "[:6]" in script and "stride=5" in script
    (tmp_path / "out" / "predict.py").write_text(script)
    questions = [" ".join(TEXTS * 5), "", "  a film ?", f" {TEXTS[1]}"]
    contexts = [" ".join(TEXTS * 3)] * len(questions)
    found = answers_of_script(tmp_path / "out", [text for row in zip(questions, contexts, strict=True) for text in row])
    expected = replies(kind, fields, model, {"question": questions, "context": contexts})
    assert found == [{name: reply[name] for name in ("answer", "start", "end")} for reply in expected]
    assert len({row["answer"] for row in found}) > 1


TAGS = ["O", "B-a", "I-a", "B-b", "I-b"]
COMPLETE = [*TAGS, "E-a", "S-a", "E-b", "S-b"]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tags"), [("bert", TAGS), ("roberta", COMPLETE), ("distilbert", ["x", "y", "z"])])
def test_the_script_tags_words_and_finds_spans(family: str, tags: list[str], tmp_path: Path):
    kind = registry.get("token-classification")
    torch.manual_seed(2)
    config = tiny(family, layers=1, labels=len(tags), id2label=dict(enumerate(tags))).config
    model = AutoModelForTokenClassification.from_config(config).eval()
    with torch.no_grad():
        model.classifier.weight.mul_(20.0)
    words = splits_bytes() if family == "roberta" else tokenizer()
    export_model(model, words, tmp_path / "out", task=None, max_length=64, latency=False)
    texts = [" ".join(random.Random(seed).choices(" ".join(TEXTS).split(), k=12)) for seed in range(20)]
    # Of the word in the middle a tokenizer that cleans texts leaves nothing.
    texts += ["so \u200d fine"] if family == "bert" else []
    found = answers_of_script(tmp_path / "out", texts)
    lists = [text.split() for text in texts]
    expected = replies(kind, kind.fields(), model, {"words": lists}, words=words, length=64)
    assert [(row["words"], row["tags"]) for row in found] == [(row["words"], row["tags"]) for row in expected]
    if tags == ["x", "y", "z"]:
        assert all("spans" not in row for row in (*found, *expected))
        return
    for row, reply in zip(found, expected, strict=True):
        assert row["spans"] == [[span["type"], *span["words"]] for span in reply["spans"]]
    assert sum(len(row["spans"]) for row in found) > 10


def test_the_script_of_a_tagger_gives_each_word_a_tag_of_the_model_or_says_that_words_do_not_fit(tmp_path: Path):
    kind = registry.get("token-classification")
    config = tiny("bert", layers=1, labels=2, id2label={0: "x", 1: "y"}).config
    model, texts = AutoModelForTokenClassification.from_config(config).eval(), ["so \u200d fine", "a " * 13, "a " * 15]
    export_model(model, tokenizer(), tmp_path / "out", task=None, max_length=LENGTH, latency=False)
    first, second = answers_of_script(tmp_path / "out", texts[:2])
    assert (
        first["words"][1] == "\u200d" and {*first["tags"], *second["tags"]} <= {"x", "y"} and len(second["tags"]) == 13
    )
    expected = replies(kind, kind.fields(), model, {"words": [text.split() for text in texts]})
    assert first["tags"][::2] == expected[0]["tags"][::2] and second["tags"] == expected[1]["tags"]
    command = [sys.executable, str(tmp_path / "out" / "predict.py"), texts[0], texts[2]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
    assert done.returncode == 1 and "15 words are more than 16 tokens: give them in parts" in done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [first]


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["", 'say "it" \U0001f642: '])
def test_the_script_embeds_texts_behind_their_prompt(prompt: str, tmp_path: Path):
    kind = registry.get("sentence-embedding")
    torch.manual_seed(3)
    model = with_new_head(tiny("bert", layers=1), kind.head, kind.configure(()))
    words = tokenizer()
    if prompt:
        settings = {"prompts": {"all": prompt}, "default_prompt_name": "all", "max_seq_length": 12}
        words.init_kwargs[PROMPTS] = settings
    export_model(model, words, tmp_path / "out", task=None, max_length=LENGTH, latency=False)
    assert ("enable_truncation(12)" in (tmp_path / "out" / "predict.py").read_text()) == bool(prompt)
    found = answers_of_script(tmp_path / "out", TEXTS)
    expected = [reply["embedding"] for reply in replies(kind, kind.fields(), model, {"text": TEXTS}, words=words)]
    for row, vector in zip(found, expected, strict=True):
        assert row["embedding"] == pytest.approx(vector.tolist(), abs=1e-5)
        cosine = vector @ expected[0] / np.linalg.norm(vector) / np.linalg.norm(expected[0])
        assert row["cosine_with_first"] == pytest.approx(float(cosine), abs=1e-5)
    assert found[1]["cosine_with_first"] < 0.9999


@pytest.mark.slow
def test_the_script_of_a_pair_takes_texts_in_twos(tmp_path: Path):
    from kdcli.recipe.schema import EvaluateSection, TaskSection
    from kdcli.tasks.load import load_task

    rows = [{"a": text, "b": other, "label": "yn"[i % 2]} for i, text in enumerate(TEXTS) for other in TEXTS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = TaskSection.model_validate({"name": "own", "data": str(tmp_path / "rows.jsonl"), "text": ["a", "b"]})
    task, model = load_task(section, EvaluateSection(), base=tmp_path), tiny("bert", layers=1)
    export_model(model, tokenizer(), tmp_path / "out", task=task, max_length=LENGTH, latency=False)
    found = answers_of_script(tmp_path / "out", [text for row in rows for text in (row["a"], row["b"])])
    columns = {name: [row[name] for row in rows] for name in ("a", "b")}
    assert found == [near(reply) for reply in replies(task.kind, task.fields, model, columns)]


@pytest.mark.slow
def test_a_model_that_may_be_for_several_tasks_gets_no_script(tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_model(tiny("bert", layers=1, problem_type="other"), folder, tokenizer())
    result = export_model(load_model(folder), tokenizer(), tmp_path / "out", task=None, latency=False)
    assert result.script is None and not (tmp_path / "out" / "predict.py").exists()


def test_the_readme_shows_the_script_of_a_classifier():
    kind = registry.get("classification")
    script = script_of(kind, kind.fields(), tiny("bert").config, tokenizer(), 128)
    assert f"```python\n{script}```" in (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
