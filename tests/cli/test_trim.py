"""kdcli trim: a folder with fewer pieces, that the library itself loads and that reads the text as before."""

import json
import re
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from conftest import ROWS, World
from families import tiny, tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kdcli.data.reviews import reviews
from kdcli.models.embedding import ASSUMED
from kdcli.models.heads import SENTENCE_EMBEDDING, SENTENCE_SETTINGS, with_new_head
from kdcli.models.load import load_tokenizer
from kdcli.models.save import save_model
from kdcli.models.sentence_folder import prompt_of

TEXTS: list[str] = reviews()["train"]["text"][:40]


def outputs(folder: Any, texts: list[str]) -> tuple[list[list[str]], torch.Tensor]:
    """Return the pieces and the logits of texts, by the library alone."""
    words = AutoTokenizer.from_pretrained(folder)
    batch = words(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        found = AutoModelForSequenceClassification.from_pretrained(folder)(**batch).logits
    return [words.convert_ids_to_tokens(row) for row in batch["input_ids"]], found


def test_a_folder_is_trimmed(world: World):
    folder = world.model()
    # What an old version of the library would read in place of tokenizer.json.
    world.write("teacher/vocab.txt", "stale\n")
    world.write("text.txt", "\n".join(TEXTS))
    done = world.call("trim", "./teacher", "--text", "text.txt", "--out", "made", "--json")
    assert done.code == 0, done.err
    report, made = done.json, world.folder / "made"
    pieces, logits = outputs(made, TEXTS)
    before = outputs(folder, TEXTS)
    assert pieces == before[0] and torch.allclose(logits, before[1], atol=1e-5)
    words = AutoTokenizer.from_pretrained(made)
    assert report["pieces"] == [len(AutoTokenizer.from_pretrained(folder)), len(words)]
    assert report["rows"] == [220, len(words)] and report["rows"][1] < report["pieces"][0]
    assert report["parameters"][0] - report["parameters"][1] == 32 * (220 - len(words))
    assert report["vocabulary_megabytes"][1] == round(32 * 4 * len(words) / 1e6, 3)
    assert report["left_out"] is None and report["held_out"]["texts"] == 4
    assert report["max_abs_difference"] <= 1e-5
    assert json.loads((made / "config.json").read_text())["vocab_size"] == len(words)
    assert not (made / "vocab.txt").exists()
    scored = world.call("eval", "made", "--data", "rows.csv", "--text", "text", "--json")
    assert scored.code == 0, scored.err
    # Nothing is replaced without a word.
    assert world.call("trim", "./teacher", "--text", "text.txt", "--out", "made").code == 2
    again = world.call("trim", "./teacher", "--text", "text.txt", "--out", "made", "--force")
    assert again.code == 0 and "vocabulary megabytes" in again.out
    assert "220" in again.err or "rows of embeddings without a piece" in again.err


def test_text_comes_from_every_kind_of_file(world: World):
    world.model()
    rows = [text for text, _ in ROWS]
    world.write("texts/rows.jsonl", "\n".join(json.dumps({"text": text, "id": "xyzzy"}) for text in TEXTS[:10]))
    table = pa.table({"text": TEXTS[10:20], "words": [text.split() for text in TEXTS[20:30]]})
    pa.parquet.write_table(table, world.folder / "texts" / "more.parquet")
    world.write("other.txt", "\n".join(TEXTS[30:]))
    sources = ["--text", "rows.csv", "--text", "texts"]
    done = world.call("trim", "./teacher", *sources, "--held-out", "other.txt", "--out", "made", "--json")
    assert done.code == 0, done.err
    assert done.json["texts"] == len(rows) + 20
    assert done.json["held_out"]["texts"] == 10
    both = ["--text", "texts/more.parquet", "--column", "text", "--column", "words"]
    done = world.call("trim", "./teacher", *both, "--out", "both", "--json")
    assert done.code == 0 and done.json["texts"] == 20


@pytest.mark.parametrize("kind", ["regressor", "headless", "filler", "half"])
def test_every_head_stays(kind: str, world: World):
    world.model(kind)
    done = world.call("trim", "./teacher", "--text", "rows.csv", "--out", "made", "--json")
    assert done.code == 0, done.err
    configs = [json.loads((world.folder / name / "config.json").read_text()) for name in ("teacher", "made")]
    assert configs[0]["architectures"] == configs[1]["architectures"]
    assert configs[0]["dtype"] == configs[1]["dtype"]


@pytest.mark.parametrize("limits", [[], ["--min-count", "3"], ["--keep", "100"], ["--keep", "100", "--no-characters"]])
def test_prompts_stay_readable(limits: list[str], world: World):
    words, read = tokenizer(), " ".join(TEXTS)
    rare = [piece for piece in words.get_vocab() if piece.isalpha() and len(piece) > 3 and piece not in read][:4]
    assert len(rare) > 1
    settings = {
        "pooling": ["mean"],
        "prompts": {"query": f"{' '.join(rare).title()}: ", "document": f"{rare[-1]} \U0001f600 "},
        "default_prompt_name": "query",
        "do_lower_case": True,
    }
    model = with_new_head(tiny("bert"), SENTENCE_EMBEDDING, {SENTENCE_SETTINGS: {**ASSUMED, **settings}})
    (world.folder / "sentences").mkdir()
    save_model(model, world.folder / "sentences", words)
    world.write("text.txt", "\n".join(TEXTS))
    done = world.call("trim", "./sentences", "--text", "text.txt", "--out", "made", *limits, "--json")
    assert done.code == 0, done.err
    full, made = (load_tokenizer(world.folder / name) for name in ("sentences", "made"))
    assert prompt_of(made) == prompt_of(full) == settings["prompts"]["query"]
    assert set(rare) <= set(made.get_vocab())
    for prompt in settings["prompts"].values():
        assert made.tokenize(prompt) == full.tokenize(prompt)
    # Prompts are no text of the user's: no number counts them.
    pieces = [full.tokenize(text) for text in TEXTS]
    changed = sum(full.tokenize(text) != made.tokenize(text) for text in TEXTS)
    assert (done.json["texts"], done.json["tokens"]) == (len(TEXTS), sum(map(len, pieces)))
    assert done.json["held_out"]["texts"] == 4
    if not limits:
        assert changed == 0 and done.json["left_out"] is None
        for text in TEXTS:
            text = prompt_of(full) + text.upper()
            assert made.tokenize(text) == full.tokenize(text)
    else:
        left_out = done.json["left_out"]
        assert (left_out["texts"], left_out["changed_texts"]) == (len(TEXTS), changed) and changed > 0


def test_chains_and_limits(world: World):
    world.model("chains")
    world.write("text.txt", "\n".join(TEXTS))
    done = world.call("trim", "./teacher", "--text", "text.txt", "--out", "made", "--json")
    assert done.code == 0, done.err
    all_of_them = done.json["pieces"][1]
    assert world.call("contract", "made", "--out", "plain").code == 0
    few = world.call("trim", "./teacher", "--text", "text.txt", "--out", "few", "--keep", all_of_them - 3, "--json")
    assert few.code == 0, few.err
    assert few.json["pieces"][1] <= all_of_them - 3
    assert 0 < few.json["left_out"]["changed_share"] < 1
    rare = ["--min-count", 30, "--no-characters"]
    rare = world.call("trim", "./teacher", "--text", "text.txt", "--out", "rare", *rare, "--json")
    assert rare.code == 0 and rare.json["pieces"][1] < few.json["pieces"][1]


def test_outputs_are_compared_where_no_text_is_read_as_before(world: World):
    world.model()
    world.write("text.txt", "\n".join(f"{text} sun{number}rise" for number, text in enumerate(TEXTS)))
    few = ["trim", "./teacher", "--text", "text.txt", "--force", "--out", "made", "--no-characters", "--min-count"]
    done = world.call(*few, 30, "--json")
    assert done.code == 0 and done.json["left_out"]["changed_texts"] == len(TEXTS)
    assert done.json["compared_texts"] == 0 and done.json["compared_parts"] == 32
    assert done.json["max_abs_difference"] <= 1e-4
    done = world.call(*few, 30)
    assert "on 0 of 40 texts and 32 parts of others" in done.err
    # Where only what stays in any case is left, nothing is read as before, and that is told.
    few[-1] = "--keep"
    least = re.search(r"fewer than the (\d+) that", world.call(*few, 1).err)
    assert least is not None
    done = world.call(*few, least[1], "--json")
    assert done.code == 0 and done.json["compared_texts"] == done.json["compared_parts"] == 0
    assert done.json["max_abs_difference"] is None
    told = world.call(*few, least[1]).err
    assert "outputs not compared with ./teacher: no word of the text is read as before" in told
