"""Conversations: which tokens have a loss, chat templates and the Alpaca layout, what is too long, and sets by name."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_decoder
from rich.console import Console
from tiny_recipes import run_recipe, write_recipe

from kdcli.cli.app import run
from kdcli.errors import InputError
from kdcli.models.hashing import hash_of_tokenizer
from kdcli.recipe.schema import EvaluateSection, TaskSection
from kdcli.tasks.base import Task
from kdcli.tasks.instruct import KIND
from kdcli.tasks.load import load_task

CHAT = (
    "{% for message in messages %}<s>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}</s>{% endgeneration %}"
    "{% else %}{{ message.content }}</s>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
"""A template as many models have it, a line break after each end token; it marks what an assistant says."""

HELLO = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes, hello."}]
MORE = [{"role": "user", "content": "And more?"}, {"role": "assistant", "content": "More and more."}]


def words_of(template: str | None = None) -> Any:
    words = small_decoder.tokenizer()
    words.chat_template = template
    return words


def task_of(folder: Path, rows: list[dict[str, Any]], **fields: Any) -> Task:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"train": "rows.jsonl", "validation": "rows.jsonl"}
    section = TaskSection(name="own", type="instruct", **files, **{"max_length": 256, **fields})
    return load_task(section, EvaluateSection(), base=folder)


def encoded(folder: Path, rows: list[dict[str, Any]], words: Any, **fields: Any) -> list[tuple[str, str]]:
    """Return each row as text, and those of its tokens that have a loss."""
    task = task_of(folder, rows, **fields)
    features = task.kind.encode(task.train, words, fields.get("max_length", 256))
    assert all(len(row["labels"]) == len(row["input_ids"]) == row["length"] for row in features)
    return [
        (words.decode(row["input_ids"]), words.decode([token for token in row["labels"] if token >= 0]))
        for row in features
    ]


def test_the_alpaca_layout_is_that_of_the_paper(tmp_path: Path):
    rows = [
        {"instruction": "Add.", "context": "1 and 2", "response": " 3\n"},
        {"instruction": "Sing.", "context": None, "response": "La"},
    ]
    task, other = "Below is an instruction that describes a task", "Write a response that appropriately completes the"
    assert encoded(tmp_path, rows, words_of()) == [
        (
            f"{task}, paired with an input that provides further context. {other} request.\n\n### Instruction:\nAdd."
            "\n\n### Input:\n1 and 2\n\n### Response:\n3</s>",
            "3</s>",
        ),
        (f"{task}. {other} request.\n\n### Instruction:\nSing.\n\n### Response:\nLa</s>", "La</s>"),
    ]
    [(first, _), _] = encoded(tmp_path, rows, words_of(), system="Be brief.")
    assert first.startswith("Be brief.\n\n### Instruction:\nAdd.")


def test_a_chat_template_is_used_where_there_is_one_and_its_line_break_has_no_loss(tmp_path: Path):
    rows = [{"instruction": "Add.", "context": "1 and 2", "response": "3"}]
    whole = "<s>user\nAdd.\n\n1 and 2</s>\n<s>assistant\n3</s>"
    assert encoded(tmp_path, rows, words_of(CHAT)) == [(whole, "3</s>")]
    assert encoded(tmp_path, rows, words_of(CHAT), system="Sum.") == [(f"<s>system\nSum.</s>\n{whole}", "3</s>")]
    assert encoded(tmp_path, rows, words_of(CHAT), template="alpaca")[0][0].startswith("Below is")


@pytest.mark.parametrize("template", [CHAT, None], ids=["chat", "alpaca"])
def test_all_responses_of_a_conversation_have_a_loss_or_the_last_one(tmp_path: Path, template: str | None):
    words = words_of(template)
    [(whole, spoken)] = encoded(tmp_path, [{"messages": HELLO + MORE}], words)
    assert spoken == "Yes, hello.</s>More and more.</s>"
    assert encoded(tmp_path, [{"messages": HELLO + MORE}], words, turns="last") == [(whole, "More and more.</s>")]
    # Columns and messages say the same.
    columns = [{"instruction": "Hello?", "response": "Yes, hello."}]
    assert encoded(tmp_path, columns, words) == encoded(tmp_path, [{"messages": HELLO}], words)


def test_the_tokens_with_a_loss_are_those_that_the_library_finds(tmp_path: Path):
    words = words_of(CHAT)
    task = task_of(tmp_path, [{"messages": HELLO + MORE}, {"messages": HELLO}])
    for row, messages in zip(task.kind.encode(task.train, words, 256), (HELLO + MORE, HELLO), strict=True):
        found = words.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        size = row["length"]
        assert found["input_ids"][:size] == row["input_ids"]
        assert [label >= 0 for label in row["labels"]] == [bool(one) for one in found["assistant_masks"][:size]]
        assert not any(found["assistant_masks"][size:])


@pytest.mark.parametrize("template", [CHAT, None], ids=["chat", "alpaca"])
def test_a_prompt_is_what_comes_before_its_response(tmp_path: Path, template: str | None):
    words = words_of(template)
    task = task_of(tmp_path, [{"messages": HELLO}, {"messages": HELLO + MORE}, {"messages": MORE}], turns="last")
    features = task.kind.encode(task.train, words, 256)
    for row, prompt in zip(features, task.kind.prompts(task.train, words, 256), strict=True):
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"][: len(prompt)] == [-100] * len(prompt) and row["labels"][len(prompt)] >= 0
        assert row["labels"][-1] in task.kind.end_tokens(words, small_decoder.model(words).config)


@pytest.mark.parametrize("template", [CHAT, None], ids=["chat", "alpaca"])
def test_what_is_too_long_is_cut_or_dropped_and_counted(tmp_path: Path, template: str | None):
    words = words_of(template)
    plain = {"instruction": "Say.", "context": "", "response": "It is."}
    base = len(words(encoded(tmp_path, [plain], words)[0][0])["input_ids"])
    sizes = {"max_length": base + 30, "max_prompt_length": base + 10}
    rows = [
        plain,
        {**plain, "context": "a bird and a tree and more " * 9},
        {**plain, "instruction": "Say a bird and a tree " * 9},
        {**plain, "response": "It is a bird. " * 20},
    ]
    cut = task_of(tmp_path, rows, **sizes)
    features = cut.kind.encode(cut.train, words, sizes["max_length"])
    assert len(features) == 4 and max(features["length"]) == sizes["max_length"]
    for row, prompt in zip(features, cut.kind.prompts(cut.train, words, sizes["max_length"]), strict=True):
        assert len(prompt) <= sizes["max_prompt_length"] and row["input_ids"][: len(prompt)] == prompt
        assert words.decode(prompt).endswith("### Response:\n" if template is None else "<s>assistant\n")
    assert "Say.\n\n" in words.decode(features[1]["input_ids"])
    assert [row["labels"][-1] == words.eos_token_id for row in features] == [True, True, True, False]
    half = f"{sizes['max_prompt_length']} tokens"
    notes = cut.kind.remarks(cut, words, sizes["max_length"])
    assert notes[0] == f"training: prompts cut to {half}: 2 of 4"
    assert notes[1] == f"training: responses cut at {sizes['max_length']} tokens in all: 1 of 4"
    dropped = task_of(tmp_path, rows, **sizes, too_long="drop")
    left = dropped.kind.encode(dropped.train, words, sizes["max_length"])
    assert left["index"][:] == [0] and dropped.kind.examples(dropped.train, words, sizes["max_length"]) == 1
    assert dropped.kind.remarks(dropped, words, sizes["max_length"])[:2] == [
        f"training: rows with prompts of more than {half} left out: 2 of 4",
        f"training: rows of more than {sizes['max_length']} tokens in all left out: 1 of 4",
    ]
    with pytest.raises(InputError, match="none of 3 rows is left"):
        only = task_of(tmp_path, rows[1:], **sizes, too_long="drop")
        only.kind.check(only, words, sizes["max_length"])


def test_rows_of_report_sets_are_counted_by_name_and_a_set_of_none_is_refused(tmp_path: Path):
    words = words_of()
    plain = {"instruction": "Say.", "response": "It is."}
    size = len(words(encoded(tmp_path, [plain], words)[0][0])["input_ids"]) + 10
    long = {**plain, "instruction": "Say a bird and a tree " * 9}
    for name, rows in (("mixed", [plain, long, long]), ("long", [long, long])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def task(*sets: str, **fields: Any) -> Task:
        test = {name: f"{name}.jsonl" for name in sets}
        sizes = {"max_length": size + 20, "max_prompt_length": size}
        return task_of(tmp_path, [plain], test=test, **sizes, **fields)

    dropping = task("mixed", too_long="drop", metrics=["rouge_l", "perplexity"])
    dropping.kind.check(dropping, words, size + 20)
    notes = [
        f"mixed: rows with prompts of more than {size} tokens left out: 2 of 3",
        "mixed: perplexity of the 1 row left, rouge_l of all 3, whose prompts are cut",
        f"scores: each model writes 3 texts of at most {size + 20} tokens",
    ]
    assert dropping.kind.remarks(dropping, words, size + 20) == notes
    assert dropping.kind.remarks_on_report(dropping, words, size + 20) == notes
    assert dropping.fewer(words, size + 20) == {"mixed": {"perplexity": 1}}
    nothing = task("mixed", "long", too_long="drop", metrics=["rouge_l", "perplexity"])
    with pytest.raises(InputError, match="long: none of 2 rows is left"):
        nothing.kind.check(nothing, words, size + 20)
    # Texts are of all rows, their prompts cut.
    texts = task("long", too_long="drop", metrics=["rouge_l"])
    texts.kind.check(texts, words, size + 20)
    assert texts.kind.remarks(texts, words, size + 20)[0] == f"long: prompts cut to {size} tokens: 2 of 2"
    assert not texts.fewer(words, size + 20)


def test_prompts_of_report_sets_that_cannot_be_cut_are_refused(tmp_path: Path):
    talk = [{"role": "system", "content": "Say a bird and a tree " * 30}, *HELLO]
    (tmp_path / "long.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    task = task_of(tmp_path, [{"messages": HELLO}], test={"far": "long.jsonl"}, metrics=["rouge_l"])
    with pytest.raises(InputError, match="far: the prompt of row 1 is longer than 128 tokens"):
        task.kind.check(task, words_of(CHAT), 256)


def test_a_run_and_a_score_tell_how_many_rows_are_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = small_decoder.write_world(
        tmp_path, method="kd", task={"too_long": "drop", "max_prompt_length": 130}, train={"max_steps": 1}
    )
    long = [{"instruction": "Name it and more. " * 30, "response": "It."}] * 3
    for name in ("rows.jsonl", "held.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in long)
    write_recipe(tmp_path / "recipe.toml", recipe)
    said = io.StringIO()
    document = run_recipe(tmp_path / "recipe.toml", console=Console(file=said, width=300))
    assert document["task"]["left"] == {"train": 24, "selection": 4} and document["task"]["sizes"]["train"] == 27
    assert "training: rows with prompts of more than 130 tokens left out: 3 of 27" in document["task"]["remarks"]
    assert set(document["task"]["remarks"]) <= set(said.getvalue().replace("note: ", "").splitlines())
    assert document["fewer"] == {"validation": {"perplexity": 4}} and document["rows"] == {"validation": 7}
    card = (Path(document["paths"]["student"]) / "README.md").read_text()
    assert "24 of 27 training examples" in card and "perplexity (validation, 4 examples)" in card
    capsys.readouterr()
    assert run(["eval", document["paths"]["run"], "--json"]) == 0
    out, notes = capsys.readouterr()
    assert "note: validation: rows with prompts of more than 130 tokens left out: 3 of 7" in notes
    assert "training" not in notes
    assert json.loads(out)["fewer"] == document["fewer"]


def test_a_text_has_no_level_of_chance_and_a_score_of_0_is_doubted():
    assert KIND.doubt(0.01, [], (), "rouge_l") is None and KIND.doubt(0.0, [], (), "perplexity") is None
    for metric in ("rouge_l", "exact_match"):
        doubt = KIND.doubt(0.0, [], (), metric)
        assert doubt is not None and "task.template" in doubt and "classes" not in doubt


def test_of_a_long_conversation_the_oldest_turns_go_first(tmp_path: Path):
    words = words_of(CHAT)
    rows = [{"messages": [{"role": "system", "content": "Sum."}, *HELLO, *MORE]}]
    [(whole, _)] = encoded(tmp_path, rows, words, turns="last")
    room = len(words(whole)["input_ids"]) - 10
    [(found, spoken)] = encoded(tmp_path, rows, words, turns="last", max_prompt_length=room - 20)
    assert found == "<s>system\nSum.</s>\n<s>user\nAnd more?</s>\n<s>assistant\nMore and more.</s>"
    assert spoken == "More and more.</s>"


def test_a_template_that_changes_earlier_turns_is_refused(tmp_path: Path):
    # As templates do that leave the thoughts of earlier turns out.
    forgetful = CHAT.replace(
        "{{ message.content }}</s>{% endgeneration %}",
        "{{ message.content if loop.last else 'Well.' }}</s>{% endgeneration %}",
    )
    with pytest.raises(InputError, match="in other tokens than the same with its response") as caught:
        encoded(tmp_path, [{"messages": HELLO + MORE}], words_of(forgetful))
    assert 'turns = "last"' in (caught.value.hint or "")
    [(_, spoken)] = encoded(tmp_path, [{"messages": HELLO + MORE}], words_of(forgetful), turns="last")
    assert spoken == "More and more.</s>"
    endless = CHAT.replace("{{ message.content }}</s>{% endgeneration %}", "{{ message.content }}{% endgeneration %}")
    with pytest.raises(InputError, match="no end token after a response"):
        encoded(tmp_path, [{"messages": HELLO}], words_of(endless))


def test_several_right_responses_are_references_and_the_first_is_trained_on(tmp_path: Path):
    rows = [{"instruction": "Name a bird.", "response": ["A tern.", "A gull."]}]
    task = task_of(tmp_path, rows)
    assert task.train["references"][:] == [["A tern.", "A gull."]]
    assert encoded(tmp_path, rows, words_of())[0][1] == "A tern.</s>"


def test_another_chat_template_is_another_tokenizer_to_a_cache():
    bare, chat, other = words_of(), words_of(CHAT), words_of(CHAT + " ")
    assert len({hash_of_tokenizer(words) for words in (bare, chat, other)}) == 3
    assert hash_of_tokenizer(chat) == hash_of_tokenizer(words_of(CHAT))


def test_messages_in_parquet_are_those_in_json(tmp_path: Path):
    rows = [{"messages": HELLO}, {"messages": HELLO + MORE}]
    plain = task_of(tmp_path, rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    files = {"train": "rows.parquet", "validation": "rows.jsonl"}
    same = load_task(TaskSection(name="own", type="instruct", **files), EvaluateSection(), base=tmp_path)
    assert same.train["messages"][:] == plain.train["messages"][:] == same.selection["messages"][:]


def test_sets_are_found_by_name_in_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KDCLI_DATA_DIR", str(tmp_path))
    table = {"instruction": ["Sing."] * 20, "input": ["", "low"] * 10, "output": ["La"] * 20}
    for name in ("alpaca", "mine"):
        (tmp_path / "instruct" / name).mkdir(parents=True)
        pq.write_table(pa.table(table), tmp_path / "instruct" / name / "train.parquet")
    monkeypatch.setattr("kdcli.data.files.read_hub", unreachable)
    mine = TaskSection(name="mine", type="instruct", context="input", response="output")
    mine_task = load_task(mine, EvaluateSection(), base=tmp_path)
    assert (len(mine_task.train), len(mine_task.selection)) == (18, 2)
    pq.write_table(pa.table(table), tmp_path / "instruct" / "alpaca" / "validation.parquet")
    named = load_task(TaskSection(name="alpaca"), EvaluateSection(), base=tmp_path)
    assert named.kind.name == "instruct" and len(named.train) == 20
    assert named.train[1]["messages"][0] == {"role": "user", "content": "Sing.", "context": "low"}
    with pytest.raises(InputError, match="is no set that kdcli knows"):
        load_task(TaskSection(name="other", type="instruct"), EvaluateSection(), base=tmp_path)


def unreachable(*_: Any) -> Any:
    raise InputError("offline")


@pytest.mark.slow
def test_a_teacher_is_fine_tuned_on_instructions_before_it_teaches(tmp_path: Path):
    small_decoder.write_world(tmp_path)
    tuned = {"model": "teacher", "finetune": {"max_steps": 2, "learning_rate": 1e-3}}
    recipe = {**small_decoder.RECIPE, "method": "kd", "teacher": tuned}
    recipe["task"] = {**recipe["task"], "metrics": ["perplexity"]}
    write_recipe(tmp_path / "recipe.toml", recipe)
    record = run_recipe(tmp_path / "recipe.toml")
    plain = run_recipe(tmp_path / "recipe.toml", "teacher.finetune=false", "name=plain", "train.max_steps=1")
    found, before = (each["teacher"]["metrics"]["validation"]["perplexity"] for each in (record, plain))
    assert found < before
