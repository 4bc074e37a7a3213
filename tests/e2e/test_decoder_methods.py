"""Methods that compare the inside of two models, on decoders of every family and on both kinds of tasks."""

from pathlib import Path
from typing import Any

import pytest
from families import DECODERS, tiny
from safetensors.torch import load_file
from small_decoder import tokenizer, write_world
from tiny_recipes import run_recipe, tiny_recipe, write_recipe
from transformers import AutoConfig, AutoModelForCausalLM

from kdcli.errors import InputError
from kdcli.models.families import FAMILIES

TEXT: dict[str, Any] = {
    "type": "causal-lm",
    "text": "response",
    "max_length": 32,
    "max_prompt_length": None,
}
KINDS: dict[str, dict[str, Any]] = {"causal-lm": TEXT, "instruct": {}}
FORMS: dict[str, dict[str, Any]] = {
    "depth": {},
    "low-rank": {"student": {"form": "low-rank", "layers": None, "rank": 8}},
    "chains": {"overparam": {"length": 1}},
}
METHODS: dict[str, dict[str, Any]] = {
    "hs": {"weights": {"embedding": 1.0}},
    "minilmv2": {"relations": {"qk": 1.0}},
    "minilm": {},
    "tinybert": {},
    "distilbert": {},
    "adkd": {},
    "lgtm": {},
    "theseus": {},
}
TERMS = {
    "hs": {"hidden", "embedding", "output", "task"},
    "minilmv2": {"relation", "output", "task"},
    "minilm": {"attention", "value", "output", "task"},
    "distilbert": {"cosine", "output", "task"},
    "adkd": {"attribution", "output", "task"},
}
"""What a step of some of them sums."""


def run(folder: Path, method: str, kind: str, form: str, **changes: Any) -> dict[str, Any]:
    document = write_world(
        folder,
        method={"name": method, "max_new_tokens": None, **METHODS[method]},
        task=KINDS[kind],
        **{**FORMS[form], **changes},
    )
    return run_recipe(write_recipe(folder / "recipe.toml", document))


def check(document: dict[str, Any], folder: Path, method: str) -> None:
    """The terms are finite and above 0, and the student is a folder that the library loads."""
    steps = [entry for stage in document["training"] for entry in stage["history"] if "loss" in entry]
    assert all(0 < entry["loss"] < 1e6 for entry in steps)
    for name in TERMS.get(method, ()):
        # A student that is cut from the teacher starts with the teacher's embeddings.
        assert 0 < max(entry[name] for entry in steps) < 1e6 or name == "embedding", name
    written = next(folder.glob("runs/*/student/model.safetensors"))
    assert all(value.isfinite().all() for value in load_file(written).values())


CASES = [
    pytest.param(method, kind, form, marks=[] if (method, kind, form) in CHEAP else pytest.mark.slow)
    for CHEAP in ({("minilmv2", "causal-lm", "low-rank"), ("adkd", "instruct", "depth")},)
    for method in METHODS
    for kind in KINDS
    for form in FORMS
    if (method, form) != ("theseus", "low-rank")
]


@pytest.mark.parametrize(("method", "kind", "form"), CASES)
def test_a_method_runs_on_a_decoder(method: str, kind: str, form: str, tmp_path: Path) -> None:
    check(run(tmp_path, method, kind, form), tmp_path, method)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hs", "minilmv2", "adkd", "theseus"])
@pytest.mark.parametrize("family", DECODERS)
def test_a_method_runs_on_every_family_of_decoders(family: str, method: str, tmp_path: Path) -> None:
    words = tokenizer()
    ids = {name: getattr(words, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    sizes = FAMILIES[family].sizes
    # A tokenizer's class may add tokens of its own.
    teacher = tiny(family, layers=4, **{sizes.vocabulary: len(words) + 8, sizes.positions: 256}, **ids)
    teacher.save_pretrained(tmp_path / "teacher")
    words.save_pretrained(tmp_path / "teacher")
    layers = 4 if method == "theseus" and sizes.by_block else 2
    check(run(tmp_path, method, "causal-lm", "depth", student={"layers": layers}), tmp_path, method)
    student = next(tmp_path.glob("runs/*/student"))
    assert AutoConfig.from_pretrained(student).model_type == family
    assert AutoModelForCausalLM.from_pretrained(student).num_parameters() > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_a_decoder_is_a_classifier_too(family: str, tmp_path: Path) -> None:
    sizes = {"layers": 2, "hidden_size": 32, "heads": 2, "intermediate_size": 64, "vocab_size": 300}
    grid = {"onnx": True, "batch_sizes": [1], "sequence_lengths": [8], "runs": 1}
    document = tiny_recipe(teacher={"scratch": {"family": family, **sizes}}, method={"name": "minilmv2"}, export=grid)
    found = run_recipe(write_recipe(tmp_path / "recipe.toml", document))
    assert found["export"]["parity"]["max_abs_difference"] < 1e-4
    check(found, tmp_path, "minilmv2")


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("theseus", FORMS["low-rank"], "theseus trains blocks inside the teacher"),
        ("minilmv2", {"method": {"relation_heads": 32}}, "32 relation heads do not divide both 32 and 16, the widths"),
        ("hs", {"teacher": {"cache": "all"}}, "the teacher's states cannot be kept"),
    ],
)
def test_what_a_decoder_cannot_do_is_refused_with_the_reason(
    method: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    changes = {**changes, "method": {"name": method, "max_new_tokens": None, **changes.get("method", {})}}
    document = write_world(tmp_path, task=TEXT, **changes)
    with pytest.raises(InputError, match=words) as caught:
        run_recipe(write_recipe(tmp_path / "recipe.toml", document))
    assert caught.value.hint is not None


def test_decisions_of_a_black_box_are_refused_on_text(tmp_path: Path) -> None:
    document = write_world(tmp_path, task=TEXT, method={"name": "dbkd", "max_new_tokens": None})
    with pytest.raises(
        InputError,
        match="dbkd works on classification and image-classification tasks: it needs one class out of several",
    ):
        run_recipe(write_recipe(tmp_path / "recipe.toml", document))
