"""Students of decoders that cannot be made, and commands on decoders that ask for what there is not."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from bad_input import Cases
from conftest import World
from families import tiny, tokenizer
from transformers import PreTrainedModel

from kdcli.models.lowrank import factorise
from kdcli.models.save import save_model
from kdcli.recipe.schema import StudentSection

CASES = Cases()
case = CASES.add


words = cache(tokenizer)


def decoder(world: World, model: PreTrainedModel, name: str = "decoder") -> str:
    """Put a decoder there, with a tokenizer, and return the name of its folder."""
    (world.folder / name).mkdir()
    save_model(model, world.folder / name, words())
    return name


def distill(world: World, model: PreTrainedModel, *, method: str = "kd", **changes: Any) -> list[str]:
    """Return the arguments of a run on plain text with this teacher."""
    world.write("text.txt", "\n\n".join(f"a fine film and a dull one, number {i}." for i in range(60)))
    task = {"name": "own", "type": "causal-lm", "data": "text.txt", "max_length": 16}
    teacher = {"model": decoder(world, model)}
    student = changes.pop("student")
    recipe = world.recipe(
        "task", "student", "method", task=task, teacher=teacher, student=student, method=method, **changes
    )
    return ["distill", recipe]


def width(world: World, family: str = "llama", **student: Any) -> list[str]:
    return distill(world, tiny(family), student={"form": "width", **student})


@case("student.kv_heads", "4 heads cannot share 3 heads of keys and values equally", "use 2")
def heads_that_share_keys_unequally(world: World) -> list[str]:
    return width(world, heads=4, kv_heads=3)


@case("student.kv_heads", "GPT-2 have as many heads of keys and values as of queries", "leave it out")
def fewer_keys_where_all_heads_have_some(world: World) -> list[str]:
    return width(world, "gpt2", kv_heads=2)


@case("student.heads", "4 heads of 3 features", "rotates pairs of features")
def narrow_heads_of_an_odd_width(world: World) -> list[str]:
    return width(world, hidden_size=12, heads=4)


@case("student.kv_heads", "at most the teacher's 2 heads can share keys and values, not 4", "use at least 2")
def projections_of_fewer_keys_than_there_are(world: World) -> list[str]:
    return width(world, heads=4, kv_heads=1, init="projections")


@case("student.init", "Gemma 2 multiplies its embeddings by a number", 'use init = "teacher"')
def projections_of_embeddings_that_are_scaled(world: World) -> list[str]:
    return width(world, "gemma2", hidden_size=16, heads=2, init="projections")


@case("student", 'form = "depth" has no kv_heads')
def a_depth_student_with_other_heads(world: World) -> list[str]:
    return distill(world, tiny("llama"), student={"form": "depth", "kv_heads": 1})


@case("student.layers", "the teacher has blocks 0 to 1, not 4")
def blocks_that_a_decoder_does_not_have(world: World) -> list[str]:
    return distill(world, tiny("llama"), student={"form": "depth", "layers": [0, 4]})


@case("student.rank", "rank 22 is not below the break-even rank of any matrix (largest 21.3)", "use a rank up to 21")
def a_rank_that_saves_nothing_in_any_matrix(world: World) -> list[str]:
    return distill(world, tiny("llama"), method="makd", student={"form": "low-rank", "rank": 22})


@case("student.embedding_rank", "embedding_rank 28 is not below the break-even rank 27.9", "use a rank up to 27")
def factors_of_embeddings_that_save_nothing(world: World) -> list[str]:
    return distill(world, tiny("llama"), student={"form": "low-rank", "rank": 4, "embedding_rank": 28})


@case("student.params", "7,000 parameters are not enough", "factorise the embeddings, too")
def fewer_parameters_than_the_embeddings_have(world: World) -> list[str]:
    return distill(world, tiny("llama"), student={"form": "low-rank", "params": 7000})


@case("student.form", "takes its weights from whole matrices", "contract MODEL --merge-lowrank")
def a_low_rank_student_of_factors(world: World) -> list[str]:
    teacher = tiny("llama")
    factorise(teacher, StudentSection(form="low-rank", rank=4, embedding_rank=4))
    return distill(world, teacher, student={"form": "low-rank", "rank": 2})


@case("method.name", "MaKD compares matrices and layers of equal widths", "use a low-rank or depth student")
def makd_of_a_narrow_decoder(world: World) -> list[str]:
    return distill(world, tiny("llama"), method="makd", student={"form": "width", "hidden_size": 16})


@case("overparam.select", "replaces matrices in the middle of a training", "GPT-2 has several of them in one")
def chains_that_grow_in_fused_matrices(world: World) -> list[str]:
    overparam = {"select": "dynamic", "matrices": 2}
    return distill(world, tiny("gpt2"), student={"form": "depth", "layers": 1}, overparam=overparam)


@case("student.init", "weights that are projections of the teacher's have no chains of their own")
def chains_of_projections_of_a_decoder(world: World) -> list[str]:
    student = {"form": "width", "hidden_size": 16, "heads": 2, "init": "projections"}
    return distill(world, tiny("llama"), student=student, overparam={"length": 1})


@case("student.model", "vocabulary has 300 tokens, the teacher's 220")
def a_student_decoder_of_another_vocabulary(world: World) -> list[str]:
    student = {"form": "checkpoint", "model": decoder(world, tiny("gpt2", vocab_size=300), "other")}
    return distill(world, tiny("llama"), student=student)


@case("student", "unknown family 'mamba'", "choose a model of one of these families")
def a_student_decoder_of_an_unknown_family(world: World) -> list[str]:
    world.write("other/config.json", '{"model_type": "mamba", "architectures": ["MambaForCausalLM"]}')
    return distill(world, tiny("llama"), student={"form": "checkpoint", "model": "other"})


@case("overparam: 172 cannot be split into two factors of similar size", "give the factors of 172 yourself")
def a_feed_forward_width_without_factors(world: World) -> list[str]:
    return ["overparam", decoder(world, tiny("llama", intermediate_size=172)), "--out", "wide"]


@case("overparam.layers", "the student has blocks 0 to 1, not 7")
def chains_in_blocks_that_a_decoder_does_not_have(world: World) -> list[str]:
    return ["overparam", decoder(world, tiny("llama")), "--layers", "7", "--out", "wide"]


@case("--keep", "2 pieces are fewer than the 19 that are kept in any case")
def a_decoder_of_hardly_any_pieces(world: World) -> list[str]:
    world.write("text.txt", "a fine film")
    return ["trim", decoder(world, tiny("llama")), "--text", "text.txt", "--keep", "2", "--out", "small"]


@case("config.json", "num_attention_heads 4 is not divisible by num_key_value_heads 3")
def heads_of_a_decoder_that_share_keys_unequally(world: World) -> list[str]:
    name = decoder(world, tiny("llama"))
    path = world.folder / name / "config.json"
    path.write_text(path.read_text().replace('"num_key_value_heads": 2', '"num_key_value_heads": 3'))
    return ["contract", name, "--out", "plain"]


QUICK = (
    heads_that_share_keys_unequally,
    fewer_keys_where_all_heads_have_some,
    projections_of_fewer_keys_than_there_are,
    projections_of_embeddings_that_are_scaled,
    factors_of_embeddings_that_save_nothing,
    chains_that_grow_in_fused_matrices,
)
"""Of decoders alone; the others show that what holds for encoders holds for them."""


@pytest.mark.parametrize("prepare", QUICK)
def test_wrong_input_is_told(prepare: Callable[[World], list[str]], world: World, own_cache: Path):
    CASES.check(prepare.__name__, world, own_cache)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in {one.__name__ for one in QUICK}])
def test_wrong_input_of_every_form_is_told(name: str, world: World, own_cache: Path):
    CASES.check(name, world, own_cache)
