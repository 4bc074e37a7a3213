"""Texts that a decoder writes for a score: the same as one by one, scored by references, and the losses beside them."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_decoder import LENGTH, ROWS, model, tokenizer

from kdcli.cli.app import run
from kdcli.data.columns import Column
from kdcli.data.tables import dataset_of
from kdcli.evaluation.score import evaluate_model
from kdcli.models.load import load_tokenizer
from kdcli.models.save import save_model
from kdcli.tasks import causal_lm
from kdcli.tasks.base import Task
from kdcli.tasks.generated import SEEDS, GeneratingKind, Writing
from kdcli.tasks.heads import load_model
from kdcli.tasks.instruct import KIND, Instruct
from kdcli.tasks.text_score import rouge_l

STORIES = Path(os.environ.get("KDCLI_DATA_DIR", "none")).parent / "models" / "stories260K"
TRAINED = Path(os.environ.get("KDCLI_TEST_DECODER", STORIES))
"""A trained decoder: another one by KDCLI_TEST_DECODER."""
WORDS = tokenizer()
LIMIT = 1e-3
"""Between the two best logits, where two ways may part: they differ by rounding."""


@pytest.fixture(scope="module")
def decoder() -> Any:
    return model(WORDS)


def task_of(rows: list[dict[str, Any]], *metrics: str, **fields: Any) -> Task:
    """Return a task whose only set are these rows."""
    own = KIND.fields(max_prompt_length=LENGTH - 20, **fields)
    kind: Instruct = KIND.with_fields(own)
    table, _ = kind.read({name: Column.of(row[name] for row in rows) for name in rows[0]}, own, "rows", [])
    held = dataset_of(table)
    return Task("own", kind, own, (), metrics or KIND.usual_metrics, held, held, {"rows": held})


def scores(decoder: Any, rows: list[dict[str, Any]], *metrics: str, batch_size: int = 4, **fields: Any) -> Any:
    found = evaluate_model(
        decoder, WORDS, task_of(rows, *metrics, **fields), batch_size=batch_size, max_length=LENGTH, device="cpu"
    )
    return found["rows"]


def written(decoder: Any, prompt: list[int], tokens: int, words: Any = WORDS) -> list[int]:
    """Return what a model continues a prompt with, token by token, without cache, batch or padding."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(decoder(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == words.eos_token_id:
                break
    return ids[len(prompt) :]


def test_scores_are_those_of_texts_that_are_written_one_by_one_and_of_the_losses_of_responses(decoder: Any):
    rows = ROWS[:5]
    task = task_of(rows)
    prompts = task.kind.prompts(task.report["rows"], WORDS, LENGTH)
    texts = [WORDS.decode(written(decoder, ids, 12), skip_special_tokens=True).strip() for ids in prompts]
    found = scores(decoder, rows, max_new_tokens=12)
    pairs = [(text, [row["response"]]) for text, row in zip(texts, rows, strict=True)]
    assert found["rouge_l"] == pytest.approx(np.mean([rouge_l(*pair) for pair in pairs]))
    assert found["exact_match"] == 0.0
    total = count = 0.0
    for row in rows:
        # The layout of Stanford Alpaca, written once more.
        prompt = (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            f"\n\n### Instruction:\n{row['instruction']}\n\n### Response:\n"
        )
        before = WORDS(prompt, add_special_tokens=False)["input_ids"]
        after = [*WORDS(row["response"], add_special_tokens=False)["input_ids"], WORDS.eos_token_id]
        with torch.no_grad():
            logits = decoder(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].double()
        total -= float(logits.log_softmax(-1).gather(1, torch.tensor(after)[:, None]).sum())
        count += len(after)
    assert found["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-5)


def test_the_best_of_several_references_counts_and_their_order_does_not(decoder: Any):
    task = task_of(ROWS[:2])
    prompts = task.kind.prompts(task.report["rows"], WORDS, LENGTH)
    own = [WORDS.decode(written(decoder, ids, 20), skip_special_tokens=True).strip() for ids in prompts]
    assert all(own)
    rows = [{**row, "response": ["something else", text]} for row, text in zip(ROWS, own, strict=False)]
    found = scores(decoder, rows, "rouge_l", "exact_match", max_new_tokens=20)
    assert found == {"rouge_l": 1.0, "exact_match": 1.0}


def test_drawn_texts_have_the_mean_and_the_deviation_over_their_seeds_whatever_the_batches(decoder: Any):
    fields: dict[str, Any] = {"max_new_tokens": 10, "sampling": {"temperature": 1.5}}
    alone = [scores(decoder, ROWS[:4], "rouge_l", seeds=[seed], **fields)["rouge_l"] for seed in SEEDS]
    whole = scores(decoder, ROWS[:4], "rouge_l", batch_size=3, **fields)
    assert len(set(alone)) > 1
    assert whole["rouge_l"] == pytest.approx(np.mean(alone))
    assert whole["rouge_l/std"] == pytest.approx(np.std(alone, ddof=1))


def test_nothing_is_written_where_no_metric_is_of_texts(decoder: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(type(decoder), "generate", lambda *_, **__: pytest.fail("a text is written"))
    assert set(scores(decoder, ROWS[:2], "perplexity", "accuracy")) == {"perplexity", "accuracy"}


def test_a_text_has_no_more_tokens_than_the_longest_input_leaves_after_its_prompt(decoder: Any):
    kind: Instruct = task_of(ROWS).kind
    prompts = kind.prompts(task_of(ROWS[:3]).report["rows"], WORDS, LENGTH)
    endless = model(WORDS)
    with torch.no_grad():
        endless.lm_head.weight[WORDS.eos_token_id] = 0
    options: dict[str, Any] = {"max_length": LENGTH, "batch_size": 2, "device": "cpu"}
    found = kind.write(endless, prompts[:2], WORDS, Writing(), **options)
    assert [reply["tokens"] for reply in found] == [LENGTH - len(prompt) for prompt in prompts[:2]]
    assert not any(reply["finished"] for reply in found)
    assert [reply["tokens"] for reply in kind.write(endless, prompts, WORDS, Writing(5), **options)] == [5] * 3


def test_a_long_text_is_continued_after_its_last_words():
    rows = dataset_of(pa.table({"text": ["a bird " * 200]}))
    [ids] = causal_lm.KIND.prompts_of(rows, WORDS, 40)
    assert len(ids) == 40
    assert ids == WORDS("a bird " * 200, add_special_tokens=False)["input_ids"][-40:]


def check_ways(folder: Path, texts: list[str], tokens: int, tmp_path: Path, call: Any, *, onnx: bool) -> None:
    """Check that a model continues texts in the same way, however it is asked.

    One by one without a cache, in batches, saved and read again, and by the program, which may export it before. Two
    ways may part where the two best logits are within LIMIT of each other.
    """
    kind: GeneratingKind = causal_lm.KIND
    words, rows = load_tokenizer(folder), dataset_of(pa.table({"text": texts}))
    prompts = kind.prompts_of(rows, words, 256)

    def by(decoder: Any, batch_size: int) -> list[str]:
        options: dict[str, Any] = {"max_length": 512, "batch_size": batch_size, "device": "cpu"}
        return [reply[kind.answer] for reply in kind.write(decoder, prompts, words, Writing(tokens), **options)]

    decoder = load_model(folder)
    ids = [written(decoder, prompt, tokens, words) for prompt in prompts]
    save_model(decoder, tmp_path / "saved", processor=words)
    lines = tmp_path / "texts.txt"
    lines.write_text("\n".join(texts), encoding="utf-8")

    def printed(name: str) -> list[str]:
        options = ["--input", lines, "--max-new-tokens", tokens, "--batch-size", 7, "--type", kind.name, "--json"]
        out = call("predict", tmp_path / name, *options)
        return [json.loads(line)[kind.answer] for line in out.splitlines()]

    found = {
        "in memory": by(decoder, 8),
        "reloaded": by(load_model(tmp_path / "saved"), 3),
        "predict": printed("saved"),
    }
    if onnx:
        call("export", tmp_path / "saved", "--out", tmp_path / "onnx", "--no-latency")
        found["ONNX"] = printed("onnx")
    assert len({tuple(each) for each in ids}) > 0.8 * len(texts)
    for way, others in found.items():
        for prompt, own, other in zip(prompts, ids, others, strict=True):
            text = kind.text_of(prompt, own[:-1] if own[-1] == words.eos_token_id else own, words)
            if text == other:
                continue
            common = max(n for n in range(len(own)) if other.startswith(kind.text_of(prompt, own[:n], words)))
            with torch.no_grad():
                best = decoder(torch.tensor([prompt + own[:common]])).logits[0, -1].topk(2).values
            assert float(best[0] - best[1]) < LIMIT, (way, text, other)


def stories(count: int) -> list[str]:
    """Return the beginnings of real stories."""
    path = Path(os.environ["KDCLI_DATA_DIR"]) / "lm" / "tinystories-small" / "validation.parquet"
    texts = pq.read_table(path, columns=["text"])["text"].to_pylist()
    return [" ".join(text.split()[: 5 + place % 20]) for place, text in enumerate(texts[:count])]


@pytest.mark.skipif(not TRAINED.is_dir(), reason="needs stories260K beside KDCLI_DATA_DIR, or KDCLI_TEST_DECODER")
@pytest.mark.parametrize("count", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_a_model_writes_the_same_in_memory_reloaded_exported_and_by_the_program(
    count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def call(*arguments: Any) -> str:
        capsys.readouterr()
        assert run([*map(str, arguments)]) == 0
        return capsys.readouterr().out

    check_ways(TRAINED, stories(count), 10 if count < 50 else 40, tmp_path, call, onnx=count == 50)
