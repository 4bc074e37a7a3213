"""Wrong input of causal language models: exit code 2, one clear message, no traceback, and nothing left behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import small_decoder
from bad_input import Cases
from conftest import World
from small_decoder import LENGTH, ROWS
from tiny_recipes import changed, write_recipe

CASES = Cases()
case = CASES.add

WORDS = small_decoder.tokenizer()
CHAT = (
    "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
TALK = [{"role": "user", "content": "Name a bird."}, {"role": "assistant", "content": "A tern."}]
TEXT: dict[str, Any] = {"name": "own", "type": "causal-lm", "data": "text.txt", "max_length": 32}

SHORT = {"max_length": 128, "max_prompt_length": 100}
"""Within the positions of the usual tiny model."""


def distill(world: World, *rows: dict[str, Any], template: str | None = None, **changes: Any) -> list[str]:
    """Write a decoder and a recipe; rows: behind the good ones, which are 24."""
    recipe = small_decoder.write_world(world.folder, method="kd", **changes)
    if template is not None:
        words = small_decoder.tokenizer()
        words.chat_template = template
        words.save_pretrained(world.folder / "teacher")
    if rows:
        world.write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in [*ROWS, *rows]))
    write_recipe(world.folder / "recipe.toml", recipe)
    return ["distill", "recipe.toml"]


def talks(world: World, *last: dict[str, Any], **changes: Any) -> list[str]:
    """Write conversations: ten good ones, and one with these messages."""
    arguments = distill(world, **changes)
    rows = [{"messages": TALK}] * 10 + [{"messages": list(last)}]
    for name in ("rows.jsonl", "held.jsonl"):
        world.write(name, "".join(json.dumps(row) + "\n" for row in (rows if name == "rows.jsonl" else rows[:4])))
    return arguments


def text(world: World, **task: Any) -> list[str]:
    """Write plain text and a recipe for it."""
    world.write("text.txt", "\n\n".join(f"It is a bird {number} and more." for number in range(40)))
    recipe = small_decoder.write_world(world.folder, changed(small_decoder.RECIPE, "task"), method="kd")
    write_recipe(world.folder / "recipe.toml", changed(recipe, task={**TEXT, **task}))
    return ["distill", "recipe.toml"]


def without_tokens(world: World, *names: str) -> None:
    """Take special tokens away from the teacher's tokenizer."""
    path = world.folder / "teacher" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in names}))


@case("task.response: rows.jsonl: row 25 has an empty response", "remove the row")
def an_empty_response(world: World) -> list[str]:
    return distill(world, {"instruction": "Name it.", "response": "  "})


@case("task.instruction: rows.jsonl: row 25 has an empty instruction")
def an_empty_instruction(world: World) -> list[str]:
    return distill(world, {"instruction": None, "response": "It."})


@case("task.messages: rows.jsonl: row 11: message 2 has the unknown role 'tool'", "known are system, user, assistant")
def an_unknown_role(world: World) -> list[str]:
    return talks(world, TALK[0], {"role": "tool", "content": "7"})


@case("task.messages: rows.jsonl: row 11: message 2, a response, has no content", "remove the row")
def an_empty_turn(world: World) -> list[str]:
    return talks(world, TALK[0], {"role": "assistant", "content": "\n"})


@case("rows.jsonl: row 11 ends with a turn of the user, not with a response", "the last message")
def a_conversation_without_its_response(world: World) -> list[str]:
    return talks(world, *TALK, TALK[0])


@case("rows.jsonl: row 11: message 2 is the user's", "take turns")
def two_turns_of_one_role(world: World) -> list[str]:
    return talks(world, TALK[0], *TALK)


@case("rows.jsonl: row 11: message 1 has 'from', 'value', not role and content")
def messages_of_another_form(world: World) -> list[str]:
    return talks(world, {"from": "human", "value": "Name it."})


@case("task.messages: rows.jsonl: row 1 has 'Name a bird number 0.' as its messages", "{role, content}")
def texts_in_place_of_messages(world: World) -> list[str]:
    return distill(world, task={"messages": "instruction"})


@case("task: give messages or instruction, not both")
def messages_beside_columns(world: World) -> list[str]:
    return distill(world, task={"messages": "talk", "instruction": "instruction"})


@case("rows.jsonl has no context column 'input'", "it has 'instruction', 'response'")
def a_context_that_is_not_there(world: World) -> list[str]:
    return distill(world, task={"context": "input"})


@case(
    "task.max_prompt_length: training: the prompt of row 1 is longer than",
    "even without its instruction",
    "system prompt",
)
def a_system_prompt_longer_than_a_prompt(world: World) -> list[str]:
    return distill(world, task={"system": "Name it and more. " * 40})


@case(f"max_prompt_length = {LENGTH} leaves no token of max_length = {LENGTH} for a response")
def a_prompt_as_long_as_all(world: World) -> list[str]:
    return distill(world, task={"max_prompt_length": LENGTH})


@case("task.max_length: training: none of 24 rows is left", 'too_long = "cut"')
def rows_that_are_all_too_long(world: World) -> list[str]:
    return distill(world, task={"max_length": 12, "max_prompt_length": 4, "too_long": "drop"})


@case("task.max_length: max_length 600 is more than the 256 positions that the model knows", "use at most 256")
def a_text_longer_than_the_context(world: World) -> list[str]:
    arguments = distill(world, task={"max_length": 600})
    path = world.folder / "teacher" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 1000}))
    return arguments


@case("task.template: the tokenizer has no chat template", 'use template = "auto" or "alpaca"')
def a_chat_template_that_is_not_there(world: World) -> list[str]:
    return distill(world, task={"template": "chat"})


@case(
    "task.template: training: the chat template refuses a conversation of system, user", "no system here", "task.system"
)
def a_template_without_system_prompts(world: World) -> list[str]:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHAT
    return distill(world, template=refusing, task={"system": "Be brief."})


@case("task.template: the chat template writes a prompt in other tokens than the same with its response")
def a_template_whose_prompts_are_other_ones(world: World) -> list[str]:
    return distill(world, template=CHAT.replace("<s>assistant {% endif %}", "<s>assistant now: {% endif %}"))


@case("task.template: the chat template writes no end token after a response", 'use template = "alpaca"')
def a_template_without_an_end(world: World) -> list[str]:
    return distill(world, template=CHAT.replace("</s>", ""))


@case("teacher.tokenizer: the tokenizer has no end-of-text token", "eos_token")
def a_tokenizer_without_an_end_of_text(world: World) -> list[str]:
    arguments = distill(world)
    without_tokens(world, "eos_token")
    return arguments


@case("teacher.tokenizer: the tokenizer has no end-of-text token")
def a_tokenizer_without_an_end_between_texts(world: World) -> list[str]:
    arguments = text(world)
    without_tokens(world, "eos_token")
    return arguments


@case("has no padding token", "pad_token")
def a_decoder_tokenizer_that_cannot_pad(world: World) -> list[str]:
    arguments = distill(world)
    without_tokens(world, "eos_token", "pad_token")
    return arguments


@case("teacher.model", "no trained head for predicting next tokens (it is a base model)", "teacher.finetune")
def a_body_that_is_to_teach(world: World) -> list[str]:
    arguments = distill(world, teacher={"model": "other"})
    small_decoder.model(WORDS).model.save_pretrained(world.folder / "other")
    WORDS.save_pretrained(world.folder / "other")
    return arguments


@case("teacher.model", "is of the family BERT, whose tokens see those that come after them")
def an_encoder_that_is_to_be_tuned_to_write(world: World) -> list[str]:
    arguments = distill(world, task=SHORT, teacher={"model": "other", "finetune": {"max_steps": 1}})
    world.model("teacher", "other")
    return arguments


@case("plain text has no test file", "give it as validation")
def a_test_file_of_plain_text(world: World) -> list[str]:
    world.write("more.txt", "More text.")
    return text(world, data=None, train="text.txt", test="more.txt")


@case("'rouge_l' cannot be the metric of a causal-lm task", "known are perplexity, accuracy")
def a_metric_of_responses_for_plain_text(world: World) -> list[str]:
    return text(world, metrics=["rouge_l"])


@case("student.model", "both models must read the same tokens", "the teacher's tokenizer")
def a_student_with_another_tokenizer(world: World) -> list[str]:
    arguments = distill(world, student={"form": "checkpoint", "model": "other", "layers": None})
    words = small_decoder.tokenizer()
    words.add_tokens(["<more>"])
    small_decoder.model(words).save_pretrained(world.folder / "other")
    vocabulary = json.loads(words._tokenizer.to_str())
    pieces = vocabulary["model"]["vocab"]
    first, second = list(pieces)[5:7]
    pieces[first], pieces[second] = pieces[second], pieces[first]
    words.save_pretrained(world.folder / "other")
    (world.folder / "other" / "tokenizer.json").write_text(json.dumps(vocabulary))
    return arguments


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_of_decoders_is_told(name: str, world: World, own_cache: Path):
    CASES.check(name, world, own_cache)
