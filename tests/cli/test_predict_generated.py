"""`kdcli predict` with models that write texts: prompts in, texts out, drawn or not, beside another model's."""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import World
from small_decoder import RECIPE, ROWS, model, tokenizer, write_world
from tiny_recipes import run_recipe, write_recipe

from kdcli.cli.choose import section_of_data
from kdcli.models.generation import generate
from kdcli.recipe.schema import TaskSection
from kdcli.tasks import causal_lm
from kdcli.tasks.instruct import KIND
from kdcli.tasks.text_score import rouge_l

WORDS = tokenizer()


@pytest.fixture
def decoder(world: World) -> Any:
    """Return a decoder, which lies in the folder `teacher`; another one lies in `other`."""
    write_world(world.folder)
    model(WORDS, seed=1).save_pretrained(world.folder / "other")
    WORDS.save_pretrained(world.folder / "other")
    return model(WORDS)


def ask(world: World, *arguments: str, tokens: int = 8) -> list[dict[str, Any]]:
    outcome = world.call("predict", "teacher", "--type", "instruct", "--max-new-tokens", tokens, *arguments, "--json")
    assert outcome.code == 0, outcome.err
    return [json.loads(line) for line in outcome.out.splitlines()]


def layout(instruction: str, context: str | None = None) -> str:
    """Return the layout of Stanford Alpaca, written once more."""
    input_ = "" if context is None else f"### Input:\n{context}\n\n"
    first = "Below is an instruction that describes a task"
    first += ". " if context is None else ", paired with an input that provides further context. "
    return (
        f"{first}Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
        f"{input_}### Response:\n"
    )


def written(decoder: Any, *prompts: str, tokens: int = 8) -> list[str]:
    ids = [WORDS(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    end = WORDS.eos_token_id
    found = generate(decoder, ids, max_new_tokens=tokens, end={end}, pad=WORDS.pad_token_id, batch_size=1)
    return [WORDS.decode(each, skip_special_tokens=True).strip() for each in found]


def test_prompts_are_answered_from_arguments_files_and_standard_input(world: World, decoder: Any):
    instructions = [row["instruction"] for row in ROWS[:3]]
    wanted = written(decoder, *map(layout, instructions))
    typed = ask(world, *instructions, "--echo")
    assert [reply["response"] for reply in typed] == wanted
    assert [reply["instruction"] for reply in typed] == instructions
    assert all(reply["finished"] == (reply["tokens"] < 8) or reply["finished"] for reply in typed)
    table = world.write("rows.csv", "instruction,response\n" + "".join(f"{text},unread\n" for text in instructions))
    assert ask(world, "--input", table, "--echo") == typed
    lines = "".join(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n" for text in instructions)
    world.monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert ask(world, "-", "--json-input", "--echo") == typed
    assert ask(world, *instructions, "--set", "messages=turns", "--echo") == typed


def test_a_context_is_given_beside_the_instruction_and_several_turns_as_messages(world: World, decoder: Any):
    [reply] = ask(world, "Name a bird.", "--with", "context=It is about trees.", "--echo")
    assert [reply["response"]] == written(decoder, layout("Name a bird.", "It is about trees."))
    assert (reply["instruction"], reply["context"]) == ("Name a bird.", "It is about trees.")
    turns = [
        {"role": role, "content": text}
        for role, text in (("user", "A bird?"), ("assistant", "Yes"), ("user", "A tree?"))
    ]
    [reply] = ask(world, "--input", world.write("turns.jsonl", json.dumps({"messages": turns})), "--echo")
    assert reply["messages"] == turns and reply["response"]


def test_what_is_drawn_depends_on_the_seed_and_the_place_and_not_on_batches(world: World, decoder: Any):
    texts = [ROWS[0]["instruction"]] * 5
    drawn = [reply["response"] for reply in ask(world, *texts, "--temperature", "1.5", "--seed", "3")]
    again = ask(world, *texts, "--temperature", "1.5", "--seed", "3", "--batch-size", "2")
    assert [reply["response"] for reply in again] == drawn and len(set(drawn)) > 1
    assert [reply["response"] for reply in ask(world, *texts, "--temperature", "1.5")] != drawn
    narrow = ask(world, *texts, "--top-k", "1", "--seed", "3")
    assert {reply["response"] for reply in narrow} == {*written(decoder, layout(texts[0]))}


def test_two_models_are_compared_by_their_texts(world: World, decoder: Any):
    replies = ask(world, "Name a bird.", "--beside", "other")
    [own], [other] = (written(each, layout("Name a bird.")) for each in (decoder, model(WORDS, seed=1)))
    assert replies[0]["response"] == own and replies[0]["beside"]["response"] == other
    assert replies[0]["agree"] is False and replies[0]["rouge_l"] == pytest.approx(rouge_l(own, [other]))
    people = world.call("predict", "teacher", "--type", "instruct", "Name a bird.", "--beside", "./teacher")
    assert people.out.startswith("> Name a bird.\n") and "beside (agree: yes" in people.out


def test_the_texts_of_a_file_are_written_into_one(world: World, decoder: Any):
    world.write("prompts.txt", "Name a bird.\nName a tree.\n")
    arguments = ["--input", "prompts.txt", "--max-new-tokens", "8", "--output", "texts.csv", "--echo"]
    assert world.call("predict", "teacher", "--type", "instruct", *arguments).code == 0
    rows = list(csv.DictReader((world.folder / "texts.csv").open(encoding="utf-8", newline="")))
    assert [row["response"] for row in rows] == written(decoder, layout("Name a bird."), layout("Name a tree."))
    assert [row["instruction"] for row in rows] == ["Name a bird.", "Name a tree."]


def test_a_prompt_that_is_too_long_is_cut_and_said_to_be(world: World, decoder: Any):
    short, long = ask(world, "Name a bird.", "Name a bird." + " and a tree" * 200)
    assert (short["cut"], long["cut"]) == (False, True) and long["response"]
    people = world.call("predict", "teacher", "--type", "instruct", "Name a bird." + " and a tree" * 200)
    assert "(cut: it is too long for the model)" in people.out.splitlines()[0]


def sampled(**source: Any) -> dict[str, Any]:
    """Return the table of a task whose texts are drawn."""
    drawn = {"max_new_tokens": 12, "sampling": {"top_k": 5}, "seeds": [1, 2]}
    return {**RECIPE["task"], **drawn, "system": "Be brief.", "template": "alpaca", "metrics": None, **source}


def of_file(task: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Return the fields of the kind with which a run of a task scores a file."""
    own = TaskSection.model_validate(task)
    plain = {"text": None, "label": None, "delimiter": None, "encoding": None}
    return section_of_data(Path("rows.jsonl"), own, **plain, **options).fields


def test_a_file_is_scored_with_the_settings_of_the_run_whose_set_has_a_name():
    files = sampled()
    kept = {name: value for name, value in files.items() if name in KIND.fields.model_fields}
    assert {"max_new_tokens", "sampling", "seeds", "system", "template", "max_prompt_length"} == kept.keys()
    assert of_file(files) == kept
    folder = sampled(name="mine", train=None, validation=None, response="output")
    # Its columns are those of the set.
    assert of_file(folder) == kept and of_file({**files, "response": "output"}) == {**kept, "response": "output"}
    assert of_file({**folder, "name": "dolly", "type": None}, changes=["template=auto"]) == {**kept, "template": "auto"}
    # Another type of task has some of the fields.
    writing = {name: kept[name] for name in ("max_new_tokens", "sampling", "seeds")}
    assert of_file(folder, of_type="causal-lm") == {
        name: value for name, value in writing.items() if name in causal_lm.KIND.fields.model_fields
    }


@pytest.mark.slow
@pytest.mark.parametrize("named", [False, True])
def test_a_run_is_scored_and_asked_as_it_was_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, named: bool
):
    from kdcli.cli.app import run

    task, near = sampled(test={"near": "held.jsonl"}), "near"
    if named:
        task, near = sampled(name="mine", train=None, validation=None), "validation"
        monkeypatch.setenv("KDCLI_DATA_DIR", str(tmp_path))
        (tmp_path / "instruct" / "mine").mkdir(parents=True)
        for split, rows in (("train", ROWS), ("validation", ROWS[:4])):
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / "instruct" / "mine" / f"{split}.parquet")
    document = write_world(tmp_path, RECIPE, method={"name": "kd", "max_new_tokens": None}, task=task)
    result = run_recipe(write_recipe(tmp_path / "recipe.toml", document))
    folder = result["paths"]["run"]
    metrics = result["student"]["metrics"][near]
    assert list(metrics) == ["rouge_l", "rouge_l/std", "exact_match", "exact_match/std", "perplexity"]
    card = (Path(result["paths"]["student"]) / "README.md").read_text(encoding="utf-8")
    assert f"{100 * metrics['rouge_l']:.2f} ± {100 * metrics['rouge_l/std']:.2f} |" in card
    capsys.readouterr()
    assert run(["eval", folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"][near] == pytest.approx(metrics)
    assert run(["eval", folder, "--data", str(tmp_path / "held.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["rows"] == pytest.approx(metrics)
    assert run(["predict", folder, "Name a bird.", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] <= 12
