"""Wrong folders of sentence-transformers: modules, settings and weights that cannot be followed."""

import json
from pathlib import Path
from typing import Any

import pytest
from bad_input import Cases
from conftest import World
from safetensors.numpy import load_file, save_file

from kdcli.models.load import load_tokenizer
from kdcli.models.save import save_model
from kdcli.models.student import build_student
from kdcli.recipe.schema import StudentSection
from kdcli.tasks.heads import load_model

CASES = Cases()
case = CASES.add

COMMAND = ["contract", "./teacher", "--out", "made"]


def edit(world: World, file: str, **changes: Any) -> list[str]:
    """Change settings in a file of a model of sentence embeddings; None removes one."""
    path = world.model("embedder") / file
    changed = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))
    return COMMAND


def with_module(world: World, number: int, **changes: str) -> list[str]:
    """Change a line of modules.json: 0 is the transformer, 1 the pooling, 2 a Dense module, 3 the normalisation."""
    path = world.model("embedder") / "modules.json"
    lines = json.loads(path.read_text())
    lines[number] |= changes
    path.write_text(json.dumps(lines))
    return COMMAND


@case("unknown pooling 'median'", "1_Pooling/config.json", "cls, max, mean")
def an_unknown_pooling(world: World) -> list[str]:
    return edit(world, "1_Pooling/config.json", pooling_mode="median")


@case("unknown pooling 'pooling_mode_attention'", "known are")
def an_unknown_pooling_of_the_older_form(world: World) -> list[str]:
    return edit(world, "1_Pooling/config.json", pooling_mode_mean_tokens=False, pooling_mode_attention=True)


@case("1_Pooling/config.json says 48 features, and the transformer gives 32")
def a_pooling_of_another_width(world: World) -> list[str]:
    return edit(world, "1_Pooling/config.json", word_embedding_dimension=48)


@case("1_Pooling/config.json leaves the tokens of prompts out of pooling", "use another teacher")
def a_pooling_without_the_prompt(world: World) -> list[str]:
    edit(world, "1_Pooling/config.json", include_prompt=False)
    world.write("teacher/config_sentence_transformers.json", '{"prompts": {"query": "find: "}}')
    return COMMAND


@case("has no 1_Pooling/config.json, which modules.json names", "copy the whole folder")
def a_pooling_that_is_not_there(world: World) -> list[str]:
    (world.model("embedder") / "1_Pooling" / "config.json").unlink()
    return COMMAND


@case("has the module LSTM, which kdcli cannot run", "supported are Transformer, Pooling, Dense, Normalize")
def an_unknown_module(world: World) -> list[str]:
    return with_module(world, 2, type="sentence_transformers.models.LSTM")


@case("has the module own_code.Dense, which kdcli cannot run")
def a_module_of_ones_own(world: World) -> list[str]:
    return with_module(world, 2, type="own_code.Dense")


@case("modules.json lists Transformer, Pooling, Pooling, Normalize", "then the others")
def two_poolings(world: World) -> list[str]:
    return with_module(world, 2, type="sentence_transformers.models.Pooling")


@case("'../elsewhere/config.json' lies outside the model's folder")
def a_module_that_lies_elsewhere(world: World) -> list[str]:
    world.write("elsewhere/config.json", "{}")
    return with_module(world, 2, path="../elsewhere")


@case("modules.json is not valid JSON")
def broken_modules(world: World) -> list[str]:
    (world.model("embedder") / "modules.json").write_text("[{]")
    return COMMAND


@case("modules.json is no list of settings")
def modules_that_are_no_list(world: World) -> list[str]:
    (world.model("embedder") / "modules.json").write_text("{}")
    return COMMAND


@case("entry 1 of modules.json has no type and path")
def a_module_without_a_path(world: World) -> list[str]:
    (world.model("embedder") / "modules.json").write_text(
        '[{"type": "a.Transformer", "path": ""}, {"type": "b.Pooling"}]'
    )
    return COMMAND


@case("2_Dense/config.json says 40 features, and the module before it gives 32")
def a_dense_module_of_another_width(world: World) -> list[str]:
    return edit(world, "2_Dense/config.json", in_features=40)


@case("2_Dense/model.safetensors has linear.weight 24 x 32", "it should have linear.weight 20 x 32")
def dense_weights_of_another_width(world: World) -> list[str]:
    return edit(world, "2_Dense/config.json", out_features=20)


@case("2_Dense/model.safetensors has weight 24 x 32", "it should have linear.weight 24 x 32")
def dense_weights_of_another_name(world: World) -> list[str]:
    path = world.model("embedder") / "2_Dense" / "model.safetensors"
    save_file({"weight": load_file(path)["linear.weight"]}, path)
    return COMMAND


@case("2_Dense/model.safetensors is not a readable safetensors file")
def damaged_dense_weights(world: World) -> list[str]:
    path = world.model("embedder") / "2_Dense" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    return COMMAND


@case("has no 2_Dense/model.safetensors", "kdcli convert")
def dense_weights_in_a_pickle(world: World) -> list[str]:
    path = world.model("embedder") / "2_Dense" / "model.safetensors"
    path.rename(path.with_name("pytorch_model.bin"))
    return COMMAND


@case("unknown activation 'os.system'", "torch.nn.modules.activation.Tanh")
def an_unknown_activation(world: World) -> list[str]:
    return edit(world, "2_Dense/config.json", activation_function="os.system")


@case("2_Dense/config.json sets use_residual, which kdcli cannot follow")
def a_residual(world: World) -> list[str]:
    return edit(world, "2_Dense/config.json", use_residual=True)


@case("module_input_name 'token_embeddings'", "kdcli knows sentence_embedding alone")
def a_dense_module_over_tokens(world: World) -> list[str]:
    return edit(world, "2_Dense/config.json", module_input_name="token_embeddings")


@case("sets truncate_dim, and kdcli takes whole embeddings", "add a Dense module")
def shortened_embeddings(world: World) -> list[str]:
    return edit(world, "config_sentence_transformers.json", truncate_dim=16)


@case("names the default prompt 'web', which is none of its prompts", "it has none")
def a_default_prompt_that_is_not_there(world: World) -> list[str]:
    return edit(world, "config_sentence_transformers.json", default_prompt_name="web")


@case("prompts in config_sentence_transformers.json is no table of texts")
def prompts_that_are_no_texts(world: World) -> list[str]:
    return edit(world, "config_sentence_transformers.json", prompts={"query": 3})


@case("says max_seq_length '256', not a number of tokens")
def a_length_that_is_no_number(world: World) -> list[str]:
    return edit(world, "sentence_bert_config.json", max_seq_length="256")


@case("sets query_expansion, which kdcli cannot follow", "remove it")
def a_setting_of_the_transformer_that_is_not_known(world: World) -> list[str]:
    return edit(world, "sentence_bert_config.json", query_expansion={"length": 32})


@pytest.mark.parametrize("name", CASES)
def test_wrong_modules_are_told(name: str, world: World, own_cache: Path):
    CASES.check(name, world, own_cache)


def test_a_folder_that_is_right_is_taken(world: World):
    world.model("embedder")
    outcome = world.call(*COMMAND)
    assert outcome.code == 0, outcome.err
    made = {path.relative_to(world.folder / "made").as_posix() for path in (world.folder / "made").rglob("*.json")}
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/config.json"} <= made


def test_factors_are_multiplied_for_programs_that_do_not_know_them(world: World):
    folder = world.model("embedder")
    model = build_student(load_model(folder), StudentSection(form="low-rank", rank=8), seed=0).model
    (world.folder / "factors").mkdir()
    save_model(model, world.folder / "factors", load_tokenizer(folder))
    outcome = world.call("contract", "./factors", "--merge-lowrank", "--out", "made")
    assert outcome.code == 0, outcome.err
    assert json.loads((world.folder / "made" / "config.json").read_text())["model_type"] == "bert"
    from sentence_transformers import SentenceTransformer

    factors, made = (SentenceTransformer(str(world.folder / name), device="cpu") for name in ("factors", "made"))
    assert abs(factors.encode("so dull") - made.encode("so dull")).max() < 1e-6
