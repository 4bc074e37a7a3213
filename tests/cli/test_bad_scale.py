"""Wrong wishes for several processes, large teachers and memory: refused when the recipe is read or planned."""

from pathlib import Path
from typing import Any

import pytest
from bad_input import Cases
from conftest import World

from kdcli.training.distributed import launcher_shards

CASES = Cases()
case = CASES.add


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_is_told(name: str, world: World, own_cache: Path):
    CASES.check(name, world, own_cache)


def fixed(world: World, **changes: Any) -> list[str]:
    """Return the arguments of a run with a teacher that is used as it is."""
    teacher = {"model": str(world.model()), "finetune": False, **changes.pop("teacher", {})}
    return ["distill", world.recipe("teacher", teacher=teacher, **changes)]


@case("train.sharding", "cannot be sharded: theseus changes how a training step runs", 'use "none"')
def a_scheme_of_its_own_sharded(world: World) -> list[str]:
    return fixed(world, method={"name": "theseus"}, train={"sharding": "fsdp"})


@case("train.sharding", "overparam.aux_weight = 0 drops it")
def compared_chains_sharded(world: World) -> list[str]:
    return fixed(world, overparam={"length": 1}, train={"sharding": "fsdp"})


@case("train.sharding", "cannot be sharded: hs uses weights of the student's blocks beside their forward pass")
def projected_weights_sharded(world: World) -> list[str]:
    student = {"form": "width", "layers": None, "hidden_size": 16, "heads": 2, "init": "projections"}
    return fixed(world, method={"name": "hs"}, student=student, train={"sharding": "fsdp"})


@case("train.sharding", 'must be one of "none", "fsdp", not "zero3"')
def another_way_to_shard(world: World) -> list[str]:
    return fixed(world, train={"sharding": "zero3"})


@case("train.gradient_checkpointing", "adkd differentiates the student's gradients")
def checkpoints_for_second_derivatives(world: World) -> list[str]:
    return fixed(world, method={"name": "adkd"}, train={"gradient_checkpointing": True})


@case('cache = "all" keeps is computed by one process', "sharding")
def kept_states_of_a_sharded_teacher(world: World) -> list[str]:
    return fixed(world, teacher={"cache": "all", "sharding": "fsdp"})


@case("teacher.dtype", "is for a teacher that is used as it is", "leave it out")
def half_a_trained_teacher(world: World) -> list[str]:
    return fixed(world, teacher={"finetune": True, "dtype": "bf16"})


@case("teacher.device_map", "is for a teacher that is used as it is")
def a_trained_teacher_on_several_devices(world: World) -> list[str]:
    return fixed(world, teacher={"finetune": True, "device_map": "auto"})


@case("teacher.sharding", "is for a teacher that is used as it is")
def a_trained_teacher_in_parts(world: World) -> list[str]:
    return fixed(world, teacher={"finetune": True, "sharding": "fsdp"})


@case("give device_map (the GPUs of one process) or sharding (over processes)")
def a_teacher_spread_twice(world: World) -> list[str]:
    return fixed(world, teacher={"device_map": "auto", "sharding": "fsdp"})


@case("teacher.device_map", "'cuda:0' is no device", "cpu")
def a_device_by_another_name(world: World) -> list[str]:
    return fixed(world, teacher={"device_map": {"cuda:0": "10GB"}})


@case("teacher.device_map", "'a lot' is no size of memory", "20GB")
def memory_without_a_number(world: World) -> list[str]:
    return fixed(world, teacher={"device_map": {"0": "a lot"}})


@case("teacher.device_map", "'1TB' is no size of memory", "GB")
def memory_in_a_unit_that_the_libraries_lack(world: World) -> list[str]:
    return fixed(world, teacher={"device_map": {"0": "1TB"}})


@case("a black box has no weights")
def half_a_black_box(world: World) -> list[str]:
    return ["distill", world.recipe("teacher", teacher={"black_box": True, "dtype": "bf16"})]


@pytest.mark.parametrize(
    ("version", "sharding", "words"),
    [
        ("1", None, "give --fsdp_version 2"),
        ("2", "none", 'train.sharding is "none", and accelerate launch is set to shard'),
    ],
    ids=["the first version", "against the recipe"],
)
def test_a_launcher_that_shards_otherwise_is_told(world: World, version: str, sharding: str | None, words: str):
    launcher_shards.cache_clear()
    world.monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    world.monkeypatch.setenv("FSDP_VERSION", version)
    try:
        outcome = world.call(*fixed(world, train={"sharding": sharding}), "--dry-run")
    finally:
        launcher_shards.cache_clear()
    assert outcome.code == 2
    assert words in outcome.err


@pytest.mark.parametrize(
    ("changes", "where", "words"),
    [
        ({"teacher": {"device_map": "auto"}}, "teacher.device_map", "which 2 processes share"),
        ({"teacher": {"finetune": {"batch_size": 3}}}, "teacher.finetune.batch_size", "over 2 processes"),
        ({"train": {"batch_size": 3}}, "train.batch_size", "over 2 processes"),
        ({"overparam": {"length": 1, "select": "dynamic", "matrices": 1}}, "overparam.select", "several processes"),
    ],
    ids=["device map", "teacher", "student", "growth"],
)
def test_a_dry_run_for_two_processes_refuses_what_they_would(
    world: World, changes: dict[str, Any], where: str, words: str
):
    arguments = [*fixed(world, **changes), "--dry-run"]
    assert world.call(*arguments).code == 0
    outcome = world.call(*arguments, "--processes=2")
    assert (outcome.code, outcome.out) == (2, "")
    assert where in outcome.err and words in outcome.err


@pytest.mark.parametrize("option", ["--config-only", "--processes=2"])
def test_options_of_a_dry_run_need_one(world: World, option: str):
    outcome = world.call(*fixed(world), option)
    assert outcome.code == 2
    assert "go with --dry-run" in outcome.err
