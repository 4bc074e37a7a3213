"""The model card: what the hub and a reader get of names that other people chose."""

import xml.etree.ElementTree
from dataclasses import replace
from typing import Any

import pytest
from families import tiny, tokenizer
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from rich.console import Console

from kdcli.distill.card import model_card
from kdcli.distill.record import FinishedRun, MethodRecord
from kdcli.distill.run import run_distill
from kdcli.evaluation.result import Loss
from kdcli.models.save import save_model
from kdcli.recipe.schema import Recipe

EVIL = "a|b <img src=x onerror=y> [l](http:x) *b* ``c` $d$ &lt; #"
NAME = "a [l](http) _b_ ``c` $d$ &lt; ![i](x) #"
"""As EVIL, of what names of runs and tasks may have."""
HTML = {"html", "h1", "h2", "p", "ul", "li", "code", "pre", "table", "thead", "tbody", "tr", "th", "td"}


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The record of a run whose teacher and data are called EVIL, and whose name and task NAME."""
    folder = tmp_path_factory.mktemp("card")
    save_model(tiny("bert", id2label={0: EVIL, 1: "good"}, label2id={EVIL: 0, "good": 1}), folder / EVIL, tokenizer())
    rows = [f'a fine film,"{EVIL}"', "a dull film,good"] * 20
    (folder / f"{EVIL}.csv").write_text("\n".join(["text,label", *rows]))
    document = {
        "name": NAME,
        "method": {"name": "kd"},
        "task": {"name": NAME, "data": f"{EVIL}.csv", "text": "text"},
        "teacher": {"model": EVIL},
        "student": {"form": "depth", "layers": 1},
        "train": {"max_steps": 1},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDCLI_CACHE", str(folder / "cache"))
        result = run_distill(
            Recipe.model_validate(document),
            recipe_path=folder / "recipe.toml",
            output=folder / "runs",
            console=Console(quiet=True),
        )
    written = (result.run.student / "README.md").read_text(encoding="utf-8")
    assert written == model_card(result.record)
    return result.record


def parts(card: str) -> tuple[Any, xml.etree.ElementTree.Element]:
    """Return the front matter as the hub reads it, and the body as HTML."""
    read = ModelCard(card)
    html = MarkdownIt("commonmark").enable("table").render(read.text)
    return read.data.to_dict(), xml.etree.ElementTree.fromstring(f"<html>{html}</html>")


def test_names_in_a_card_are_read_as_they_stand(record: FinishedRun):
    _, body = parts(model_card(record))
    assert {element.tag for element in body.iter()} <= HTML
    assert ["".join(heading.itertext()) for heading in body.iter("h1")] == [NAME]
    assert NAME in [span.text for span in body.iter("code")]
    items = ["".join(item.itertext()).strip() for item in body.iter("li")]
    assert f"teacher: {EVIL}" in items and any(EVIL in item for item in items if item.startswith("data: "))
    assert {len(line) for line in body.iter("tr")} == {3, 8}
    # The classes, with precision, recall and F1 of both models.
    classes = ["".join(line[0].itertext()) for line in body.iter("tr") if len(line) == 8]
    assert classes == ["class", EVIL, "good"]


def test_a_card_without_scores_says_nothing_of_them(record: FinishedRun):
    result = record.result
    assert result.teacher is not None
    bare: dict[str, Any] = {"metrics": {}, "score": None, "by_class": {}}
    sides = {"teacher": replace(result.teacher, **bare), "student": replace(result.student, **bare)}
    card = model_card(replace(record, result=replace(result, **sides, loss=Loss(2.0, 1.0))))
    assert "held-out loss of the distillation: 2.0000 before, 1.0000 after" in card and "| parameters |" in card
    for words in ("Scores hold for", "## By class"):
        assert words in model_card(record) and words not in card


def test_the_front_matter_of_a_card_is_data(record: FinishedRun):
    front, _ = parts(model_card(record))
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["knowledge-distillation", "kd"],
    }
    method = MethodRecord(name="x]\n---\nlicense: {mine: [", title="<b>", paper="A_b_c, <i>")
    front, body = parts(model_card(replace(record, method=method)))
    assert front["tags"] == ["knowledge-distillation", method.name]
    assert {element.tag for element in body.iter()} <= HTML


@pytest.mark.parametrize("plain", [True, False])
def test_a_model_of_embeddings_is_one_of_sentence_transformers(record: FinishedRun, plain: bool):
    form = "depth" if plain else "low-rank"
    one = replace(record, student_head="sentence-embedding", student_form=form)
    assert one.is_plain == plain
    front, body = parts(model_card(one))
    assert front == {
        "library_name": "sentence-transformers" if plain else "kdcli",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "knowledge-distillation", "kd"],
    }
    loading = "".join(body.find("body/pre" if body.find("pre") is None else "pre").itertext())
    assert 'SentenceTransformer("FOLDER")' in loading and ("import kdcli" in loading) == (not plain)
