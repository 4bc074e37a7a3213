"""Comparing recipes: statistics against scipy, equal terms, and a real comparison that goes on where it stopped."""

import csv
import json
import re
import shutil
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import tiny, tokenizer
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console
from scipy import stats
from tiny_recipes import changed, tiny_recipe, write_recipe
from transformers import BertForMaskedLM

from kdcli.cli.app import run
from kdcli.compare.figure import MARKERS, draw, draw_panel, drawn
from kdcli.compare.plan import Entry, plan_comparison
from kdcli.compare.report import Block, Report, Row, make_report
from kdcli.compare.run import run_cells
from kdcli.compare.statistics import paired_difference, summarise
from kdcli.errors import InputError
from kdcli.markdown import table_row
from kdcli.models.save import save_model

QUIET = Console(quiet=True)
RECIPE = tiny_recipe(
    task={"train_samples": 96, "validation_samples": 60},
    teacher={
        "scratch": {"layers": 2, "hidden_size": 16, "heads": 2, "intermediate_size": 32, "vocab_size": 200},
        "finetune": {"max_steps": 3},
    },
    train={"max_steps": 3},
)
SCRATCH = RECIPE["teacher"]["scratch"]


def recipe(folder: Path, method: str | dict[str, Any], name: str | None = None, *without: str, **changes: Any) -> Path:
    """Write a recipe of a method, called after it or `name`."""
    return write_recipe(folder / f"{name or method}.toml", changed(RECIPE, *without, method=method, **changes))


def words_of(svg: bytes) -> set[str]:
    """Return every text of an SVG file that is text, not drawn letters."""
    root = xml.etree.ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return {"".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")}


def test_a_summary_has_the_sample_standard_deviation():
    summary = summarise({1: 0.5, 2: 0.7, 3: 0.9})
    assert summary is not None and summary.mean == pytest.approx(0.7) and summary.std == pytest.approx(0.2)
    single = summarise({1: 0.5})
    assert single is not None and single.std is None
    assert summarise({}) is None


def test_the_interval_of_a_paired_difference_is_that_of_scipys_paired_test():
    generator = np.random.default_rng(0)
    mine, base = generator.normal(0.8, 0.02, 5), generator.normal(0.78, 0.02, 5)
    found = paired_difference(dict(enumerate(mine)), dict(enumerate(base)))
    interval = stats.ttest_rel(mine, base).confidence_interval(0.95)
    assert found is not None and found.mean == pytest.approx(float((mine - base).mean()))
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_only_seeds_that_both_have_are_paired():
    found = paired_difference({1: 0.9, 2: 0.8, 4: 0.1}, {1: 0.7, 2: 0.7, 3: 0.9})
    assert found is not None and found.count == 2 and found.mean == pytest.approx(0.15)
    one = paired_difference({1: 0.9}, {1: 0.7})
    assert one is not None and one.low is None and one.high is None
    assert paired_difference({1: 0.9}, {2: 0.7}) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"max_steps": 4}}, r"training steps is 3 \(kd\) but 4 \(other\)"),
        ({"student": {"layers": 2}}, "student.parameters"),
        ({"task": {"train_samples": 95}}, "fingerprint of its data"),
        ({"teacher": {"scratch": {**SCRATCH, "hidden_size": 32}}}, "teacher.scratch.hidden_size"),
        ({"train": {"batch_size": 16}}, "train.batch_size"),
        ({"teacher": {"finetune": {"max_steps": 5}}}, "teacher.finetune.max_steps"),
        ({"assistant": {"hidden_size": 16, "layers": 2}}, "training steps is 3 .kd. but 6"),
    ],
)
def test_unequal_terms_are_refused_with_both_values(tmp_path: Path, changes: dict[str, Any], words: str):
    files = [recipe(tmp_path, "kd"), recipe(tmp_path, "kd", "other", **changes)]
    with pytest.raises(InputError, match=words):
        plan_comparison(files, seeds=2, console=QUIET)
    plan = plan_comparison(files, seeds=2, console=QUIET, allow_unequal=True)
    assert plan.unequal and len(plan.cells) == 4


def test_masking_more_tokens_is_no_equal_term(tmp_path: Path):
    (tmp_path / "my.txt").write_text("\n\n".join(f"a sentence about number {n}" for n in range(40)))
    task = {"name": "mine", "type": "text", "data": "my.txt", "max_length": 16}
    finetune = [{"task": {"name": "reviews", "train_samples": 20, "validation_samples": 20}}]
    files = [
        recipe(tmp_path, method, None, "task", task={**task, "mask_probability": share}, finetune=finetune)
        for method, share in (("od", 0.15), ("minilmv2", 0.5))
    ]
    plan = plan_comparison(files, seeds=1, console=QUIET, allow_unequal=True)
    assert [difference.field for difference in plan.unequal] == ["task.mask_probability"]


def test_copies_of_training_rows_are_no_equal_terms(tmp_path: Path):
    save_model(BertForMaskedLM(tiny("bert").config), tmp_path / "masked-lm", tokenizer())
    with pytest.raises(InputError, match=r"task\.augment"):
        plan_comparison(
            [recipe(tmp_path, "kd"), recipe(tmp_path, "kd", "more", task={"augment": {"model": "masked-lm"}})],
            seeds=1,
            console=QUIET,
        )


def test_methods_and_their_options_may_differ(tmp_path: Path):
    files = [
        recipe(tmp_path, "hs"),
        recipe(tmp_path, "kd"),
        recipe(tmp_path, {"name": "kd", "temperature": 4.0}, "warm"),
    ]
    plan = plan_comparison(files, seeds=3, console=QUIET)
    assert plan.seeds == [42, 43, 44] and plan.baselines == {"reviews": "kd"}
    assert len({cell.name for cell in plan.cells}) == 9
    # One teacher serves all seeds.
    assert {cell.recipe.teacher.seed for cell in plan.cells} == {42}


CHAINS, SVD = "overparam.length=1", "overparam.factorization=svd"


def test_each_recipe_runs_plain_and_once_with_each_variant(tmp_path: Path):
    files = [recipe(tmp_path, "hs"), recipe(tmp_path, "kd")]
    plan = plan_comparison(files, seeds=1, console=QUIET, variants=[CHAINS, SVD])
    labels = [entry.label for entry in plan.entries]
    assert labels == [name + end for name in ("hs", "kd") for end in ("", f"+{CHAINS}", f"+{SVD}")]
    assert [entry.plain for entry in plan.entries] == [None, "hs", "hs", None, "kd", "kd"]
    forms = [(section.factorization, section.length) if section else None for section in map(overparam, plan.entries)]
    assert forms == [None, ("mpo", 1), ("svd", 3)] * 2
    assert plan.baselines == {"reviews": "kd"} and plan.unequal == []
    assert plan.cells[1].name == f"reviews-hs+{CHAINS}-seed42"
    both = plan_comparison(files[1:], seeds=1, console=QUIET, variants=["train.learning_rate=1e-4,student.layers=[1]"])
    assert both.entries[1].recipe.train.learning_rate == 1e-4 and both.entries[1].recipe.student.layers == [1]
    assert both.entries[1].label == "kd+train.learning_rate=1e-4,student.layers=[1]"


def overparam(entry: Entry) -> Any:
    return entry.recipe.overparam


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ("train.max_steps=4", r"training steps is 3 \(kd\) but 4 \(kd\+train.max_steps=4\)"),
        ("student.layers=2", "student.parameters"),
        ("train.colour=red", r"--variant train.colour=red: train.colour: unknown field"),
        ("train.max_steps=many", r"--variant train.max_steps=many: train.max_steps"),
        ("student.layers=[9]", r"--variant student.layers=\[9\]: student.layers"),
        ("seed.more=1", r"--variant seed.more=1"),
        ("method", r"--variant method: takes FIELD=VALUE\[,FIELD=VALUE...\]"),
        ("student.layers=0,1", r"takes FIELD=VALUE.*not '1'"),
        ("train.learning_rate=1e-3", r"--variant train.learning_rate=1e-3: changes nothing in .*kd.toml"),
        ("name=x,export.onnx=true", "changes nothing"),
        ("task=rte", "--variant task=rte: takes .*kd.toml from task reviews to rte"),
        ("task.train_samples=90", "fingerprint of its data"),
    ],
)
def test_a_variant_that_is_wrong_unequal_or_nothing_new_is_refused_by_its_name(
    tmp_path: Path, variant: str, words: str
):
    with pytest.raises(InputError) as refused:
        plan_comparison([recipe(tmp_path, "kd")], seeds=1, console=QUIET, variants=[variant])
    assert re.search(words, f"{refused.value.where}: {refused.value.message}")


@pytest.mark.slow
def test_a_variant_is_a_row_with_a_difference_to_its_plain_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    words = ["compare", str(recipe(tmp_path, "kd")), str(recipe(tmp_path, "hs")), "--seeds", "2"]
    variant = "student.init=random"
    assert run([*words, "--variant", variant, "--json"]) == 0
    [block] = json.loads(capsys.readouterr().out)["tasks"]
    rows = {row["name"]: row for row in block["rows"]}
    assert list(rows) == ["kd", f"kd+{variant}", "hs", f"hs+{variant}"]
    for name in ("kd", "hs"):
        plain, changed = rows[name], rows[f"{name}+{variant}"]
        expected = np.mean([changed["scores"][seed] - plain["scores"][seed] for seed in ("42", "43")])
        assert plain["variant"] is None
        assert changed["variant"]["of"] == name and changed["variant"]["changes"] == [variant]
        assert changed["variant"]["difference"]["mean"] == pytest.approx(expected)
    text = (tmp_path / "comparison" / "comparison.md").read_text()
    table = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("| ")]
    place = table[0].index("to the plain recipe")
    assert [bool(line[place]) for line in table[2:]] == [False, False, True, False, True]
    lines = {row["name"]: row for row in csv.DictReader((tmp_path / "comparison" / "comparison.csv").open())}
    assert [line["variant_of"] for line in lines.values()] == ["", "", "kd", "", "hs"]
    to_plain = rows[f"hs+{variant}"]["variant"]["difference"]
    assert float(lines[f"hs+{variant}"]["to_plain_low"]) == pytest.approx(to_plain["low"])
    record = json.loads((tmp_path / "comparison" / "runs" / f"reviews-hs+{variant}-seed43" / "run.json").read_text())
    assert record["recipe"]["student"]["init"] == "random" and record["overrides"] == [variant]
    # Tables for people fold names, in whatever width.
    monkeypatch.setenv("COLUMNS", "72")
    for more in ([], ["--dry-run"]):
        assert run([*words, "--variant", variant, *more]) == 0
        table = capsys.readouterr().out
        cells = [re.split("[│┃]", line) for line in table.splitlines() if line[:1] in "│┃"]
        first = "".join(row[2 if more else 1].strip() for row in cells)
        assert all(f"{name}+{variant}" in first for name in ("kd", "hs")) and "…" not in table, table
        assert max(map(len, table.splitlines())) <= 72


def test_two_rows_of_one_name_and_a_strange_baseline_are_refused(tmp_path: Path):
    (tmp_path / "a").mkdir()
    twins = [recipe(tmp_path, "kd"), recipe(tmp_path / "a", "kd")]
    with pytest.raises(InputError, match="both called 'kd'"):
        plan_comparison(twins, seeds=1, console=QUIET)
    with pytest.raises(InputError, match="no recipe called 'makd'"):
        plan_comparison(twins[:1], seeds=1, console=QUIET, baseline="makd")


def test_a_comparison_runs_reports_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    files = [str(recipe(tmp_path, "kd")), str(recipe(tmp_path, "hs"))]

    def compare(*options: str) -> dict[str, Any]:
        assert run(["compare", *files, "--seeds", "2", "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    report = compare()
    [block] = report["tasks"]
    assert [row["name"] for row in block["rows"]] == ["kd", "hs"] and block["baseline"] == "kd"
    kd, hs = block["rows"]
    expected = [hs["scores"][seed] - kd["scores"][seed] for seed in ("42", "43")]
    assert hs["difference"]["mean"] == pytest.approx(np.mean(expected))
    assert kd["parameters"]["inference"] == hs["parameters"]["inference"] < block["teacher"]["parameters"]

    folder = tmp_path / "comparison"
    rows = list(csv.DictReader((folder / "comparison.csv").open()))
    assert [row["name"] for row in rows] == ["teacher", "kd", "hs"]
    assert float(rows[1]["score"]) == pytest.approx(kd["mean"])
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert words_of((folder / "comparison.svg").read_bytes()) >= {
        "kd (baseline)",
        "hs",
        "teacher",
        "reviews (accuracy)",
    }
    assert f"{100 * kd['mean']:.2f}" in (folder / "comparison.md").read_text()
    assert {"schema_version": 1, **json.loads((folder / "comparison.json").read_text())} == report
    assert len(list((folder / "runs").glob("reviews-*/run.json"))) == 4

    lost = folder / "runs" / "reviews-hs-seed43"
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("runs/reviews-*/student/model.safetensors")}
    shutil.rmtree(lost)
    again = compare()
    assert again["tasks"][0]["rows"][1]["scores"] == hs["scores"]
    for path, stamp in kept.items():
        assert (path.stat().st_mtime_ns == stamp) == (lost not in path.parents), path

    assert run(["compare", *files, "--seeds", "2", "--set", "train.learning_rate=2e-3"]) == 2
    assert "from another recipe" in capsys.readouterr().err


def test_scores_on_each_part_of_a_task_stand_below_their_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    rows = "\n".join(f"a film {number},{['negative', 'positive'][number % 2]}" for number in range(60))
    (tmp_path / "rows.csv").write_text(f"text,label\n{rows}\n")
    task = {"name": "films", "text": "text", "part": [{"name": "own", "data": "rows.csv"}, {"name": "reviews"}]}
    files = [str(recipe(tmp_path, "kd", None, "task", task={**task, "train_samples": 96, "validation_samples": 20}))]
    warm = recipe(tmp_path, "kd", "warm", "task", task={**task, "train_samples": 96, "mixing_temperature": 3.0})
    with pytest.raises(InputError, match=r"task\.mixing_temperature is 1\.0 .kd. but 3\.0"):
        plan_comparison([Path(files[0]), warm], seeds=1, console=QUIET)
    assert run(["compare", *files, "--seeds", "2", "--json"]) == 0
    [block] = json.loads(capsys.readouterr().out)["tasks"]
    [kd] = block["rows"]
    records = [json.loads(Path(path, "run.json").read_text()) for path in kd["runs"]]
    for name in ("own", "reviews"):
        expected = np.mean([record["student"]["metrics"][name]["accuracy"] for record in records])
        assert kd["sets"][name] == pytest.approx(expected)
    assert np.mean(list(kd["sets"].values())) == pytest.approx(kd["mean"])
    assert np.mean(list(block["teacher"]["sets"].values())) == pytest.approx(block["teacher"]["score"])
    written = (tmp_path / "comparison" / "comparison.md").read_text()
    shown = [f"{100 * kd['sets'][name]:.2f}" for name in ("own", "reviews")]
    assert table_row(["", "own", "reviews"]) in written and table_row(["kd", *shown]) in written
    assert run(["compare", *files, "--seeds", "2"]) == 0
    assert "films (accuracy), set by set" in capsys.readouterr().out


@pytest.fixture
def block(tmp_path: Path) -> Block:
    """Five students, two of them of nearly one size, one without a result, and their teacher."""
    entry = plan_comparison([recipe(tmp_path, "kd")], seeds=1, console=QUIET).of("reviews")[0]
    rows = [
        Row(label, entry, dict(enumerate(scores)), parameters, parameters, 1.0, [])
        for label, parameters, scores in (
            ("kd", 2_000_000, [0.70, 0.80]),
            ("a<b & $c$_1^2", 2_010_000, [0.74]),
            ("hs", 3_500_000, [0.81, 0.83, 0.85]),
            ("large", 6_000_000, [0.86]),
            ("failed", None, []),
        )
    ]
    return Block("reviews", "accuracy", "kd", 0.9, 10_000_000, rows).finish()


def test_a_metric_where_less_is_better_is_reported_in_its_own_unit_and_kept_the_other_way_round(block: Block):
    rows = [Row(row.label, row.entry, {0: 20.0, 1: 30.0}, 1, 1, 1.0, []) for row in block.rows[:2]]
    rows[1].scores = {0: 15.0, 1: 20.0}
    own = Block("books", "perplexity", "kd", 12.5, 10_000_000, rows).finish()
    report = Report([0, 1], [own], None, {}, [], [], [])
    teacher, baseline, other = report.cells_of(own)
    assert (teacher[1], teacher[3]) == ("12.500", "100.0%")
    assert (baseline[1], baseline[3]) == ("25.000 ± 7.071", "50.0%")
    assert other[1] == "17.500 ± 3.536" and other[2].startswith("-7.500 [") and other[3] == "71.4%"
    assert "(perplexity: as it is, less is better)" in report.markdown()
    assert "perplexity (less is better)" in words_of(draw(report)["svg"])


def test_the_figure_names_every_row_that_has_a_score_in_text(block: Block):
    report = Report([42], [block], None, {}, [], [], [])
    files = draw(report)
    words = words_of(files["svg"])
    assert words >= {"kd (baseline)", "a<b & $c$_1^2", "hs", "large", "teacher", "reviews (accuracy)"}
    assert not any("failed" in word for word in words)
    assert draw(report) == files


def test_names_in_the_report_and_the_figure_are_read_as_they_stand(block: Block):
    evil = "a|b <img src=x onerror=y> [l](http://x) *b* `c` $d$ &lt; #\x1b[2J\u202e"
    block.rows[1].label = block.title = evil
    report = Report([42], [block], None, {evil: "1,024 examples a step"}, [], [f"{evil}\n# left out"], [])
    html = MarkdownIt("commonmark").enable("table").render(report.markdown())
    document = xml.etree.ElementTree.fromstring(f"<html>{html}</html>")
    tags = {element.tag for element in document.iter()}
    assert tags <= {"html", "h1", "h2", "p", "ul", "li", "strong", "code", "img"} | {
        *("table", "thead", "tbody", "tr", "th", "td")
    }
    assert [image.get("src") for image in document.iter("img")] == ["comparison.svg"]
    seen = evil.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    cells = [["".join(cell.itertext()) for cell in line] for line in document.iter("tr")]
    assert {len(line) for line in cells} == {7} and seen in [line[0] for line in cells]
    assert [heading.text for heading in document.iter("h2")] == [f"{seen} (accuracy)"]
    assert {seen, f"{seen} (accuracy)"} <= words_of(draw(report)["svg"])


def marks_of(panel: Any) -> dict[str, tuple[float, float]]:
    """Return where each shape stands, in the panel's own numbers."""
    middles = [bar.lines[0] for bar in panel.containers]
    assert all(line.get_transform() == panel.transData for line in middles)
    return {line.get_marker(): tuple(line.get_xydata()[0]) for line in middles}


def test_every_mark_stands_at_its_size_and_its_score(block: Block):
    # Two of one size and one score: nothing is moved to tell them apart but their labels.
    block.rows[1].parameters, block.rows[1].scores = block.rows[0].parameters, {0: 0.75}
    block.finish()
    panel = Figure().subplots()
    draw_panel(panel, block, 3.0)
    marks = marks_of(panel)
    assert len(panel.containers) == 5
    expected = [(2.0, 75.0), (2.0, 75.0), (3.5, 83.0), (6.0, 86.0)]
    assert [marks[shape] for shape in MARKERS[:4]] == [pytest.approx(place) for place in expected]
    assert marks["*"] == pytest.approx((10.0, 90.0))
    spans = [bar.lines[2][0].get_segments()[0] for bar in panel.containers if bar.has_yerr]
    deviations = {span[0, 0]: (span[1, 1] - span[0, 1]) / 2 for span in spans}
    assert deviations == pytest.approx({2.0: 100 * np.std([0.7, 0.8], ddof=1), 3.5: 2.0})
    (left, right), (low, high) = panel.get_xlim(), panel.get_ylim()
    assert left < 2.0 and right > 10.0
    # A label is beside the panel, at its own height, and tied to its mark.
    labels = {text.get_text(): text for text in panel.texts}
    assert set(labels) == {"kd (baseline)", "a<b & $c$_1^2", "hs", "large", "teacher"}
    for name, shape in zip(labels, [*MARKERS[:4], "*"], strict=True):
        assert labels[name].xy == pytest.approx(marks[shape]) and labels[name].arrow_patch is not None
        assert labels[name].get_position()[0] > 1.0
    levels = sorted(text.get_position()[1] for text in labels.values())
    assert low <= levels[0] and levels[-1] <= high
    assert min(np.diff(levels)) >= 0.17 / 3.0 * (high - low) * 0.999


def test_labels_do_not_lie_upon_each_other_however_many_and_long_they_are(block: Block):
    many = [
        Row(f"row {number} {'x' * 60}", block.rows[0].entry, {0: 0.8, 1: 0.81}, 4_000_000, 4_000_000, 1.0, [])
        for number in range(25)
    ]
    crowd = Block("crowd", "accuracy", many[0].label, None, None, many).finish()
    figure = drawn(Report([42], [crowd, block], None, {}, [], [], []))
    width = figure.bbox.width
    # An annotation's own extent has its line in it.
    boxes = [Text.get_window_extent(text) for panel in figure.axes for text in panel.texts]
    assert len(boxes) == 25 + 5
    # Nor upon the other panel, and all of them are whole.
    panels = [panel.get_window_extent() for panel in figure.axes]
    for place, box in enumerate(boxes):
        assert box.x0 >= 0 and box.x1 <= width
        assert not any(box.overlaps(other) for other in [*boxes[:place], *panels])


def test_the_legend_says_what_the_bars_are(block: Block):
    def said(*rows: Row) -> set[str]:
        shown = Block("reviews", "accuracy", rows[0].label, None, None, list(rows)).finish()
        words = words_of(draw(Report([42], [shown], None, {}, [], [], []))["svg"])
        return {word for word in words if "seed" in word}

    kd, odd, hs, large, _ = block.rows
    assert said(kd, odd, hs) == {"mean ± standard deviation over 2 to 3 seeds", "one seed: no bar"}
    assert said(kd) == {"mean ± standard deviation over 2 seeds"}
    assert said(odd, large) == {"one seed: no bar"}


def test_what_breaks_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "comparison" / "runs").mkdir(parents=True)
    files = [str(recipe(tmp_path, "kd")), str(recipe(tmp_path, "hs"))]
    # A plain file stands where a run is to be made.
    (tmp_path / "comparison" / "runs" / "reviews-hs-seed42").write_text("")
    code = run(["compare", *files, "--seeds", "1"])
    shown = capsys.readouterr()
    assert code == 2 and "no result: reviews-hs-seed42" in shown.err
    report = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert [row["mean"] is None for row in report["tasks"][0]["rows"]] == [False, True]


@pytest.mark.slow
def test_a_method_is_left_out_on_tasks_of_a_kind_that_it_does_not_know(tmp_path: Path, data_dir: Path):
    files = [recipe(tmp_path, "kd"), recipe(tmp_path, "dbkd")]
    small = ["task.train_samples=32", "task.validation_samples=32"]
    plan = plan_comparison(files, seeds=1, console=QUIET, overrides=small, tasks=["stsb", "rte"])
    assert [(entry.task, entry.label) for entry in plan.entries] == [("stsb", "kd"), ("rte", "kd"), ("rte", "dbkd")]
    [line] = plan.left_out
    assert "dbkd" in line and "stsb" in line and "classification" in line
    with pytest.raises(InputError, match="none of the recipes"):
        plan_comparison(files[1:], seeds=1, console=QUIET, overrides=small, tasks=["stsb"])
    results = run_cells(plan, tmp_path / "runs", console=QUIET)
    report = make_report(plan, results).to_json()
    assert report["notes"][0] == line
    assert [row["name"] for row in report["average"]["rows"]] == ["kd"]


def test_a_dry_run_tells_every_cell_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    files = [str(recipe(tmp_path, "kd")), str(recipe(tmp_path, "hs"))]
    before = sorted(tmp_path.rglob("*"))
    words = ["compare", *files, "--seeds", "2", "--dry-run"]
    assert run([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [(cell["run"], cell["steps"], cell["done"]) for cell in plan["cells"]] == [
        (f"reviews-{name}-seed{seed}", 3, False) for seed in (42, 43) for name in ("kd", "hs")
    ]
    assert plan["baselines"] == {"reviews": "kd"} and plan["unequal"] == []
    assert run(words) == 0
    table = capsys.readouterr().out
    assert "kd (baseline)" in table and "0 of 2" in table and "plan: 2 rows x 2 seeds (42, 43), 4 runs" in table
    # What the comparison refuses, its dry run refuses in the same words.
    other = str(recipe(tmp_path, "kd", "other", train={"max_steps": 4}))
    assert run(["compare", files[0], other, "--dry-run"]) == 2
    refused = capsys.readouterr().err
    assert run(["compare", files[0], other]) == 2
    assert capsys.readouterr().err == refused and "training steps is 3 (kd) but 4 (other)" in refused
    assert run(["compare", files[0], other, "--dry-run", "--allow-unequal"]) == 0
    assert "not on equal terms: reviews: training steps" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == sorted([*before, Path(other)])
