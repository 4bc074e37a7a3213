"""What a method cannot work with is refused when the recipe is planned, before any work goes into a teacher."""

import json
from pathlib import Path
from typing import Any

import pytest
from families import tiny, tokenizer
from rich.console import Console
from tiny_recipes import tiny_recipe, write_recipe
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from kdcli.distill.plan import make_plan
from kdcli.distill.prepare import prepare, stage_loop
from kdcli.distill.recipe import load_recipe
from kdcli.distill.resolve import resolve
from kdcli.distill.run import run_distill
from kdcli.errors import InputError
from kdcli.methods.base import Stage
from kdcli.models.save import save_model

RECIPE = tiny_recipe("teacher", "student", teacher={"model": "teacher", "finetune": {"max_steps": 2}})

WRONG = {
    "an assistant whose depth the student does not divide": (
        ["method=tinybert", "student.layers=2", "assistant.layers=3"],
        "student.layers: 3 blocks cannot be divided among 2",
    ),
    "an assistant that does not divide the teacher's depth": (
        ["method=tinybert", "student.layers=2", "assistant.layers=4"],
        "assistant.layers: 6 blocks cannot be divided among 4",
    ),
    "a checkpoint for a scheme that cuts its own student": (
        ["method=theseus", "student.form=checkpoint", "student.model=other"],
        "student.form: ",
    ),
    "a checkpoint with other heads": (
        ["method=minilm", "student.form=checkpoint", "student.model=other"],
        "student.heads: ",
    ),
    "ranks by energy for a method that compares other shapes": (
        ["method=theseus", "student.form=low-rank", "student.energy=0.9"],
        "student.form: ",
    ),
    "a step of several parts for a teacher that looks one step ahead": (
        ["method=lgtm", "student.layers=3", "train.gradient_accumulation=2"],
        "train.gradient_accumulation: ",
    ),
    "a field of another form than the method's": (["student.budget=0.5"], "student.budget: has no budget"),
    "a depth for a method that makes low-rank students": (
        ["method=makd", "student.layers=2"],
        "student.layers: has no layers",
    ),
    "a field of another form in an assistant": (
        ["method=minilm", "student.layers=2", "assistant.budget=0.5"],
        "assistant.budget: has no budget",
    ),
    "chains with nothing in the teacher to compare with": (
        ["student={form='width', hidden_size=16, layers=2, heads=2}", "overparam.length=1"],
        "overparam.aux_weight: no matrix of the student has a teacher matrix of its shape",
    ),
    "a rank that chains have no factors for": (
        ["method=makd", "student.rank=7", "overparam.length=1"],
        "student.rank: rank 7 cannot be split into two factors of similar size, which [overparam] needs",
    ),
    "a checkpoint that reads other tokens": (
        ["student.form=checkpoint", "student.model=renamed"],
        "student.model: both models must read the same tokens: number ",
    ),
    "an assistant that reads other tokens": (
        ["method=hs", "student.layers=2", "assistant={form='checkpoint', model='renamed'}"],
        "assistant.model: both models must read the same tokens: number ",
    ),
    "recorded decisions that are not there": (
        ["method={name='dbkd', black_box={decisions='absent.jsonl'}}"],
        "method.black_box.decisions: no file at ",
    ),
    "a callable that is not there": (
        ["method={name='dbkd', black_box={callable='absent:decide'}}"],
        "method.black_box.callable: cannot import 'absent'",
    ),
    "a program that is not there": (
        ["method={name='dbkd', black_box={command=['absent']}}"],
        "method.black_box.command: there is no such program",
    ),
    "a student of decisions cut from a teacher that is fine-tuned already": (
        ["method=dbkd", "teacher.finetune=false"],
        "student.form: dbkd starts from the model that the teacher was before its fine-tuning, and teacher is",
    ),
    "a low-rank one": (
        ["method=dbkd", "teacher.finetune=false", "student.form=low-rank"],
        "student.form: dbkd starts from the model that the teacher was before its fine-tuning",
    ),
    "a teacher that learns from its base model, which is not there": (
        [
            "method={name='lgtm', from_base=true}",
            "teacher.finetune=false",
            "student={form='checkpoint', model='other'}",
        ],
        "teacher.model: lgtm starts from the model that the teacher was before its fine-tuning",
    ),
    "an assistant whose student's teacher would start from another model": (
        ["method={name='lgtm', from_base=true}", "student.layers=2", "assistant={form='depth', layers=3}"],
        "assistant: has no base model",
    ),
    "questions beside recorded decisions": (
        ["method={name='dbkd', copies=3, black_box={decisions='decisions.csv'}}"],
        "method.copies: copies has no effect",
    ),
}


def renamed_tokens() -> Any:
    """Return a tokenizer of as many tokens, two of which have changed places."""
    document = json.loads(tokenizer().backend_tokenizer.to_str())
    words = document["model"]["vocab"]
    first, second = sorted(words, key=words.__getitem__)[-2:]
    words[first], words[second] = words[second], words[first]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(document)), pad_token="[PAD]")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with its teacher, two other models and recorded decisions beside it."""
    folder = tmp_path_factory.mktemp("planning")
    models = (
        ("teacher", tiny("bert", layers=6), tokenizer()),
        ("other", tiny("bert", num_attention_heads=2), tokenizer()),
        ("renamed", tiny("bert", layers=6), renamed_tokens()),
    )
    for name, model, words in models:
        save_model(model, folder / name, words)
    decisions = [f"{index},negative" for index in range(48)]
    (folder / "decisions.csv").write_text("\n".join(["index,label", *decisions]))
    return write_recipe(folder / "recipe.toml", RECIPE)


@pytest.mark.parametrize("case", WRONG)
def test_it_is_refused_before_the_teacher_is_trained(case: str, path: Path, tmp_path: Path, own_cache: Path):
    changes, words = WRONG[case]
    recipe = load_recipe(path, changes)
    with pytest.raises(InputError) as planned:
        prepare(recipe, path)
    with pytest.raises(InputError) as started:
        run_distill(recipe, recipe_path=path, output=tmp_path / "runs", console=Console(quiet=True))
    for error in (planned, started):
        place, message = words.split(": ", 1)
        assert str(error.value.where).endswith(place)
        assert message in error.value.message
    assert not (own_cache / "teachers").exists() or not any((own_cache / "teachers").iterdir())


def test_a_plan_with_an_assistant_tells_both_trainings(path: Path):
    recipe = load_recipe(path, ["method=minilm", "student.layers=2", "assistant.layers=3", "assistant.form=depth"])
    plan = make_plan(prepare(recipe, path))
    document = plan.to_json()
    assert [stage["steps"] for stage in document["assistant"]["stages"]] == [2]
    assert document["teacher"]["parameters"] > document["assistant"]["parameters"] > document["student"]["parameters"]
    assert document["student"]["teacher_layers"] == [1, 2]


def test_a_schedule_in_the_recipe_comes_before_a_stages_own(path: Path):
    own = Stage("first", [], share=0.5, scheduler="constant", warmup=0.0)
    found = []
    for changes in ([], ["train.scheduler=cosine"], ["train.warmup=0.2"]):
        resolved = resolve(load_recipe(path, ["student.layers=3", *changes]), path)
        loop = stage_loop(resolved, own, 4, 40)
        found.append((loop.scheduler, loop.warmup))
    assert found == [("constant", 0.0), ("cosine", 0.0), ("constant", 0.2)]


def test_tinyberts_first_stage_has_a_constant_rate_and_the_second_a_lower_one_that_falls(path: Path):
    prepared = prepare(load_recipe(path, ["method=tinybert", "student.layers=2"]), path)
    loops = [stage_loop(prepared.resolved, stage, 100, 40) for stage in prepared.followers[-1].stages]
    assert [(loop.scheduler, loop.warmup, loop.learning_rate, loop.max_steps) for loop in loops] == [
        ("constant", 0.0, 1e-3, 77),
        ("linear", 0.1, 3e-5, 23),
    ]
