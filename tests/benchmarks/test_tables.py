"""The script of the benchmark tables: its cells, their order, equal sizes, and the tables that it prints."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from kinds import KINDS
from scipy import stats
from tables import (
    AT_A_TIME,
    BASELINES,
    CHAINS,
    CPU,
    GPU,
    HALF,
    KD,
    MAKD,
    METHODS,
    RECIPES,
    SIXTH,
    STAGES,
    THIRD,
    Cell,
    Outcome,
    Row,
    Size,
    next_cell,
    outcomes_of,
    run_all,
    tables,
)
from transformers import AutoConfig, AutoModelForSequenceClassification

from kdcli.distill.recipe import load_recipe
from kdcli.distill.resolve import resolve
from kdcli.models.student import build_student

ROWS = [row for stage in STAGES for row in stage]


def outcome(cell: Cell, student: float, profile=GPU) -> Outcome:
    return Outcome(cell.name, cell.changes(profile), 0.8, student, 1_000_000, 10.0, 20.0, "cpu")


def table_of(text: str, title: str) -> list[list[str]]:
    """Return the cells of all table rows under a title."""
    section = text.partition(f"### {title}\n")[2].partition("###")[0]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in section.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("profile", [CPU, GPU], ids=["cpu", "gpu"])
def test_every_cell_is_there_once_and_the_most_important_ones_come_first(profile):
    cells = METHODS.cells(profile)
    assert len({cell.name for cell in cells}) == len(cells)
    first = {(cell.task, cell.row.recipe) for cell in cells[:30]}
    assert [cell.task for cell in cells[:6]] == ["stsb"] * 6 and {cell.seed for cell in cells[:6]} == {42, 43, 44}
    assert first == {(task, method) for task in profile.sizes for method in ("kd", "makd")}
    assert {cell.row for cell in cells} == set(ROWS) >= set(BASELINES.values())
    assert not any((cell.task, cell.row.recipe) == ("stsb", "dbkd") for cell in cells)


def test_only_the_tables_that_the_profile_names_have_fewer_tasks():
    assert {cell.task for cell in METHODS.cells(CPU) if cell.row.table == CHAINS} == {"sst2"}
    assert {cell.task for cell in METHODS.cells(GPU) if cell.row.table == CHAINS} == set(GPU.sizes)


def test_the_estimate_of_all_cells_fits_into_14_minutes():
    assert sum(cell.seconds(GPU) for cell in METHODS.cells(GPU)) / AT_A_TIME < 14 * 60


def test_the_students_of_a_table_have_equal_numbers_of_parameters(encoder):
    config = AutoConfig.from_pretrained(encoder, num_labels=2)
    with torch.device("meta"):
        teacher = AutoModelForSequenceClassification.from_config(config)

        def size(row: Row) -> int:
            recipe = load_recipe(RECIPES / f"{row.recipe}.toml", list(row.changes))
            section = resolve(recipe, RECIPES / "any.toml").student
            return build_student(teacher, section, seed=0).model.num_parameters()

        for title in (HALF, THIRD, SIXTH):
            sizes = {row.label: size(row) for row in ROWS if row.table == title}
            fewer = {label: sizes.pop(label) for label in list(sizes) if ", a" in label}
            assert max(sizes.values()) <= 1.002 * min(sizes.values()), sizes
            assert all(count < min(sizes.values()) for count in fewer.values())


def test_cells_of_a_task_wait_for_the_cell_that_makes_its_teacher():
    a, b = Cell(KD, "stsb", 42), Cell(MAKD, "stsb", 42)
    c = Cell(KD, "rte", 42)
    assert next_cell([a, b, c], [], []) == a
    assert next_cell([b, c], [a], []) == c
    assert next_cell([b], [a, c], []) is None
    assert next_cell([b, c], [a], ["stsb"]) == b
    assert next_cell([], [a], ["stsb"]) is None


def test_a_finished_cell_is_found_unless_it_was_made_from_other_sizes(tmp_path):
    cells = [Cell(KD, "rte", seed) for seed in (42, 43, 44)]
    (tmp_path / "cells").mkdir()
    for cell, profile in zip(cells, (CPU, GPU), strict=False):
        path = tmp_path / "cells" / f"{cell.name}.json"
        path.write_text(json.dumps(asdict(outcome(cell, 0.5, profile))))
    assert outcomes_of(tmp_path, cells, CPU) == {cells[0]: outcome(cells[0], 0.5, CPU)}
    assert list(outcomes_of(tmp_path, cells, GPU)) == [cells[1]]


def test_the_tables_have_means_deviations_and_paired_intervals():
    mine, base = [0.701, 0.713, 0.722], [0.69, 0.70, 0.712]
    found = {Cell(MAKD, "rte", 42 + n): outcome(Cell(MAKD, "rte", 42 + n), score) for n, score in enumerate(mine)}
    found |= {Cell(KD, "rte", 42 + n): outcome(Cell(KD, "rte", 42 + n), score) for n, score in enumerate(base)}
    found[Cell(KD, "sst2", 42)] = outcome(Cell(KD, "sst2", 42), 0.9)
    head, _, teacher, kd, makd, below, _, less = table_of(tables(found), HALF)
    assert head[1:3] == ["SST-2, accuracy", "RTE, accuracy"] and teacher[1:3] == ["80.00", "80.00"]
    assert kd[:3] == ["`kd`", "90.00 (1)", "70.07 ± 1.10"] and makd[:3] == ["`makd`", "", "71.20 ± 1.05"]
    interval = stats.ttest_rel(mine, base).confidence_interval(0.95)
    assert below == ["less `kd`", "SST-2", "RTE"]
    assert less == ["`makd`", "", f"**+1.13 [{100 * interval.low:+.2f}, {100 * interval.high:+.2f}]**"]


def test_a_table_whose_baseline_is_of_another_one_shows_it():
    row = next(row for row in ROWS if row.table == CHAINS)
    found = {cell: outcome(cell, 0.5) for cell in (Cell(KD, "sst2", 42), Cell(KD, "rte", 42), Cell(row, "sst2", 42))}
    text = tables(found)
    rows = table_of(text, CHAINS)
    assert [cells[0] for cells in rows[2:]] == ["teacher", "`kd`", row.label, "less `kd`", "---", row.label]
    assert rows[0][1:-3] == ["SST-2, accuracy"] and rows[-1] == [row.label, "+0.00"]
    assert THIRD not in text


@pytest.mark.slow
def test_cells_run_once_share_a_teacher_and_go_on_where_they_were_stopped(tmp_path, data_dir, monkeypatch, capfd):
    profile = replace(CPU, sizes={"rte": Size(32, 16, 1, 1)}, changes=(*CPU.changes, "task.validation_samples=20"))
    cells = [Cell(row, "rte", 42) for row in (KD, MAKD)]
    for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "KDCLI_CACHE"):
        monkeypatch.setenv(name, "1")
    options = {"workers": 2, "threads": 1}
    run_all(cells, profile, tmp_path, minutes=0.0, **options)
    assert not outcomes_of(tmp_path, cells, profile)
    run_all(cells[:1], profile, tmp_path, minutes=None, **options)
    run_all(cells, profile, tmp_path, minutes=None, **options)
    lines = capfd.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines if ": teacher" in line] == [cell.name for cell in cells]
    assert len(list((tmp_path / "cache" / "teachers").iterdir())) == 1
    assert not list((tmp_path / "runs").iterdir())
    first, second = outcomes_of(tmp_path, cells, profile).values()
    assert first.teacher == second.teacher and first.parameters < second.parameters


def test_further_kinds_run_plain_before_chains_and_one_seed_before_the_next():
    cells = KINDS.cells(KINDS.cpu)
    assert len({cell.name for cell in cells}) == len(cells) == 2 * 2 * (5 * len(KINDS.metrics) + 1 + 3)
    blocks = [(cell.seed, "+OPDF" in cell.row.label) for cell in cells]
    assert list(dict.fromkeys(blocks)) == [(42, False), (42, True), (43, False), (43, True)]
    assert blocks == sorted(blocks) and set(KINDS.order) == set(KINDS.cpu.sizes) == set(KINDS.metrics)


def test_every_row_is_a_valid_recipe():
    for study, profile in ((METHODS, CPU), (METHODS, GPU), (KINDS, KINDS.cpu)):
        for cell in study.cells(profile, seeds=1):
            recipe = load_recipe(RECIPES / f"{cell.row.recipe}.toml", cell.changes(profile))
            assert recipe.task.name == cell.task and recipe.seed == 42 == recipe.teacher.seed
