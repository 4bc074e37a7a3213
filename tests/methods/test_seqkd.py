"""SeqKD: the teacher's own text to the prompts of the rows, kept in parts, and a student that is trained on it."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from rich.console import Console
from safetensors.torch import load_file
from small_decoder import ROWS, model, tokenizer, write_world
from tiny_recipes import run_recipe, write_recipe
from training.stages import TWO_PROCESSES, Killed, distill, kill_after

from kdcli.data.rows import stored
from kdcli.distill.plan import make_plan
from kdcli.distill.prepare import prepare
from kdcli.distill.recipe import load_recipe
from kdcli.errors import RunError
from kdcli.models import generation
from kdcli.models.generation import Sampling, generate
from kdcli.models.load import load_tokenizer
from kdcli.tasks.heads import load_model
from kdcli.tasks.load import load_task
from kdcli.tasks.responses import prompt_of, with_response
from kdcli.training.responses import Writing, responses_to

QUIET = Console(quiet=True)
DRAWN = Sampling(1.0)
FORMS: dict[str, dict[str, Any]] = {
    "depth": {"student": {"form": "depth", "layers": 1}},
    "low-rank": {"student": {"form": "low-rank", "budget": 0.5, "layers": None}},
    "width": {"student": {"form": "width", "hidden_size": 16, "heads": 2, "layers": 1}},
    "checkpoint": {"student": {"form": "checkpoint", "model": "teacher", "layers": 1}},
    "chains": {"overparam": {"length": 1}},
}
OPTIONS: dict[str, dict[str, Any]] = {"gkd": {"on_policy": 1.0}, "minillm": {"long_term": True}, "seqkd": {}}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("KDCLI_CACHE", str(folder))
    return folder


def recipe_in(folder: Path, **changes: Any) -> Path:
    return write_recipe(folder / "recipe.toml", write_world(folder, **changes))


def rows_of(count: int, words: Any) -> Dataset:
    """Return features of `count` rows with prompts of different lengths, and responses that mean nothing."""
    ids = [[1, *words(f"Name a bird number {number}")["input_ids"][: 2 + number % 9], 3, 4] for number in range(count)]
    labels = [[-100] * (len(row) - 2) + row[-2:] for row in ids]
    batch = {
        "index": pa.array(range(100, 100 + count), pa.int64()),
        "input_ids": pa.array(ids, pa.list_(pa.int32())),
        "attention_mask": pa.array([[1] * len(row) for row in ids], pa.list_(pa.int8())),
        "labels": pa.array(labels, pa.list_(pa.int32())),
        "length": pa.array(map(len, ids), pa.int32()),
    }
    return stored([pa.RecordBatch.from_pydict(batch)])


def writing(words: Any, **options: Any) -> Writing:
    values = {"max_new_tokens": 6, "max_length": 64, "seed": 0, "end": frozenset({2, *range(40, 60)})}
    return Writing(**{"sampling": DRAWN, "pad": words.pad_token_id, **values, **options})


def written(
    rows: Dataset, teacher: Any, how: Writing, console: Console = QUIET, **options: Any
) -> dict[int, list[int]]:
    """Return the responses by the rows' numbers."""
    keys: dict[str, Any] = {"batch_size": 5, "device": "cpu", "use_cache": True, "console": console, **options}
    found = responses_to(rows, teacher, how, **keys)
    return {index: response for part, _, all_ in found for index, response in zip(part["index"], all_, strict=True)}


def test_the_prompt_is_all_before_the_last_response() -> None:
    assert prompt_of([5, 6, 7, 8], [-100, -100, 7, 8]) == [5, 6]
    assert prompt_of([5, 6, 7, 8, 9], [-100, 6, -100, 8, -100]) == [5, 6, 7]
    assert prompt_of([5, 6], [-100, -100]) == [5, 6]
    row = with_response({"index": 3, "input_ids": [5, 6, 7], "labels": [-100, 6, 7], "part": 1}, [5], [8, 9, 2])
    assert row == {
        "index": 3,
        "part": 1,
        "input_ids": [5, 8, 9, 2],
        "attention_mask": [1, 1, 1, 1],
        "labels": [-100, 8, 9, 2],
        "length": 4,
    }


def test_the_student_is_trained_on_what_the_teacher_writes_to_the_prompts(tmp_path: Path, cache: Path) -> None:
    """The rows of a run, from the files in the cache, against one-by-one generation from the kind's own prompts."""
    recipe = recipe_in(tmp_path, method={"generation_seed": 5})
    run_recipe(recipe)
    (file,) = cache.glob("responses/*/*.arrow")
    with pa.ipc.open_file(file.read_bytes()) as reader:
        table, record = reader.read_all(), json.loads(reader.schema.metadata[b"kdcli"])
    assert record["seed"] == 5 and record["sampling"] == {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    assert record["max_new_tokens"] == 12
    loaded = load_recipe(recipe)
    task = load_task(loaded.task, loaded.evaluate, base=tmp_path)
    teacher: Any = load_model(str(tmp_path / "teacher"), task.kind.head.name)
    words = load_tokenizer(tmp_path / "teacher")
    kind: Any = task.kind
    prompts = kind.prompts(task.train, words, loaded.task.max_length)
    ends = kind.end_tokens(words, teacher.config)
    options: dict[str, Any] = {"max_new_tokens": 12, "end": ends, "pad": 0, "sampling": DRAWN, "seed": 5}
    found = dict(zip(table["index"].to_pylist(), table["response"].to_pylist(), strict=True))
    assert len(found) == len(ROWS)
    for index, prompt in zip(task.train["index"], prompts, strict=True):
        assert generate(teacher, [prompt], numbers=[index], **options) == [found[index]]


def test_only_what_is_missing_is_written_again(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that is stopped, another part that is damaged, one of something else: the rest of the files stays."""
    words = tokenizer()
    teacher, rows, how = model(words), rows_of(17, words), writing(words)
    whole = written(rows, teacher, how, use_cache=False)
    assert not cache.exists()
    stopped = responses_to(rows, teacher, how, batch_size=5, device="cpu", use_cache=True, console=QUIET)
    next(stopped), next(stopped)
    stopped.close()
    assert not teacher.training and teacher.device.type == "cpu"

    def files() -> dict[str, tuple[int, int]]:
        return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in cache.glob("responses/*/*")}

    first = files()
    assert len(first) == 2
    assert written(rows, teacher, how) == whole
    second = files()
    assert len(second) == 4 and first.items() <= second.items()
    damaged, torn, other = sorted(cache.glob("responses/*/*"))[:3]
    content = bytearray(damaged.read_bytes())
    found = pa.ipc.open_file(damaged.read_bytes()).read_all()["response"].combine_chunks().values
    content[content.index(np.array(found, np.int32).tobytes())] ^= 1
    damaged.write_bytes(content)
    torn.write_bytes(torn.read_bytes()[:100])
    other.unlink()
    other.mkdir()
    console = Console(force_terminal=False, width=400)
    assert written(rows, teacher, how, console) == whole
    assert capsys.readouterr().out.count("is made again: ") == 3
    assert sum(files()[name] == second[name] for name in second) == 1
    assert written(rows, teacher, how, console) == whole and capsys.readouterr().out == ""
    for changes in ({"seed": 1}, {"sampling": Sampling(0.9)}, {"max_new_tokens": 5}, {"end": frozenset({2})}):
        before = len(files())
        assert written(rows, teacher, writing(words, **changes)) != whole
        assert len(files()) == before + 4


def test_responses_do_not_depend_on_their_batches() -> None:
    words = tokenizer()
    teacher, rows, how = model(words), rows_of(13, words), writing(words)
    whole = written(rows, teacher, how, use_cache=False)
    assert written(rows, teacher, how, use_cache=False, batch_size=2) == whole
    assert len(whole) == 13 and len({tuple(response) for response in whole.values()}) > 5


def test_a_plan_says_how_much_is_written_and_writes_nothing(tmp_path: Path, cache: Path) -> None:
    recipe = recipe_in(tmp_path)
    prepared = prepare(load_recipe(recipe), recipe)
    task, words = prepared.task, prepared.processor
    kind: Any = task.kind
    room = [160 - len(prompt) for prompt in kind.prompts(task.train, words, 160)]
    for options, most in (([], 12), (["method.max_new_tokens=150"], 150)):
        notes = make_plan(prepare(load_recipe(recipe, options), recipe)).method.notes
        assert (
            min(room) < 150
            and f"the teacher writes 24 responses, at most {sum(min(most, each) for each in room):,} tokens together"
            in notes
        )
    assert not list(cache.glob("responses/*"))


def test_responses_without_text_are_left_out_and_counted(tmp_path: Path, cache: Path) -> None:
    """A teacher that ends half of its responses at once; one that ends all of them."""
    recipe = recipe_in(tmp_path)
    words, teacher = tokenizer(), model(tokenizer())
    drawn = generate(teacher, [[1, 5]] * 200, max_new_tokens=1, end=set(), pad=0, sampling=DRAWN)
    common = sorted({token for (token,) in drawn})
    for ends, told in ((common[::2], "without text are left out"), (list(range(len(words))), None)):
        teacher.config.eos_token_id = ends
        teacher.generation_config.eos_token_id = ends
        teacher.save_pretrained(tmp_path / "teacher")
        with open(tmp_path / "said", "w+") as file:
            console = Console(file=file, width=400)
            if told is None:
                with pytest.raises(RunError, match="ends every response before its first word"):
                    run_recipe(recipe, console=console, force=True)
                continue
            record = run_recipe(recipe, console=console)
            file.seek(0)
            said = file.read()
        assert told in said and record["training"][0]["steps"] == 2
        (table,) = (pa.ipc.open_file(path.read_bytes()).read_all() for path in cache.glob("responses/*/*.arrow"))
        texts = [[token for token in response if token not in ends] for response in table["response"].to_pylist()]
        empty = sum(not words.decode(text).strip() for text in texts)
        assert 0 < empty < len(ROWS) and f"; {empty} without text are left out" in said


def test_the_share_of_the_teachers_distributions(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    for share, terms in ((0.0, {"task": 1.0}), (0.5, {"output": 0.5, "task": 0.5})):
        plan = make_plan(prepare(load_recipe(recipe, [f"method.token_kd={share}"]), recipe))
        assert {name: weight for name, weight in plan.stages[0].terms.items() if weight} == terms


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_student(tmp_path: Path, cache: Path) -> None:
    recipe = recipe_in(tmp_path, train={"max_steps": 4, "eval_every": 2}, method={"token_kd": 0.5})
    whole = run_recipe(recipe, "name=whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 2, "checkpoints/1-")
        run_recipe(recipe, "name=parts")
    resumed = run_recipe(recipe, "name=parts", resume=True)
    assert resumed["hashes"]["student"] == whole["hashes"]["student"]
    assert resumed["training"][0]["history"] == whole["training"][0]["history"]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["seqkd", "gkd", "minillm"])
def test_every_form_of_a_student_is_trained(method: str, form: str, tmp_path: Path, cache: Path) -> None:
    options = {**OPTIONS[method], **({"token_kd": 0.5} if method == "seqkd" else {})}
    recipe = recipe_in(tmp_path, **FORMS[form], method={"name": method, **options})
    record = run_recipe(recipe)
    assert record["training"][0]["steps"] == 2
    run = Path(record["paths"]["run"])
    # What is handed over writes.
    student: Any = load_model(str(run / "student"), load_task_kind(recipe).head.name)
    assert generate(student, [[1, 5, 6]], max_new_tokens=3, end=set(), pad=0)


def load_task_kind(recipe: Path) -> Any:
    loaded = load_recipe(recipe)
    return load_task(loaded.task, loaded.evaluate, base=recipe.parent).kind


def ending_early(folder: Path, method: str) -> Path:
    """Return a recipe whose teacher writes responses of very different lengths."""
    recipe = recipe_in(folder, method={"name": method, **OPTIONS[method]})
    teacher = model(tokenizer())
    teacher.config.eos_token_id = teacher.generation_config.eos_token_id = [2, *range(40, 90)]
    teacher.save_pretrained(folder / "teacher")
    return recipe


@pytest.mark.slow
@pytest.mark.parametrize("method", ["seqkd", "gkd", "minillm"])
def test_micro_batches_and_processes_agree_with_one_batch(method: str, tmp_path: Path, cache: Path) -> None:
    """Every process writes to its own rows; responses differ in length, and tokens weigh equally over all of them."""
    recipe = ending_early(tmp_path, method)

    def weights(name: str) -> dict[str, Any]:
        for path in cache.glob("responses"):
            path.rename(tmp_path / f"responses of {name}")
        return load_file(tmp_path / "runs" / name / "student" / "model.safetensors")

    run_recipe(recipe, "name=one")
    one = weights("one")
    run_recipe(recipe, "name=parts", "train.gradient_accumulation=4")
    others = [weights("parts")]
    if method != "gkd":
        distill(tmp_path, "two", *TWO_PROCESSES)
        others.append(weights("two"))
    for other in others:
        for key in one:
            torch.testing.assert_close(other[key], one[key], atol=2e-5, rtol=1e-3)
    if method == "seqkd":
        names = [{path.name for path in tmp_path.glob(f"responses of {name}/*/*")} for name in ("one", "two", "parts")]
        assert names[0] and names[0] == names[1] == names[2]


@pytest.mark.slow
def test_9025_rows_need_no_more_memory_than_100(cache: Path) -> None:
    words = tokenizer()
    teacher, how = model(words, layers=1), writing(words, max_new_tokens=2)

    def peak(rows: Dataset) -> tuple[int, int]:
        tokens = 0
        tracemalloc.start()
        for _, _, found in responses_to(rows, teacher, how, batch_size=64, device="cpu", use_cache=True, console=QUIET):
            tokens += sum(map(len, found))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most, tokens

    with pytest.MonkeyPatch.context() as patch:
        # What is imported for the first line of progress is no memory of the rows.
        patch.setattr(generation, "SECONDS", 0.0)
        peak(rows_of(300, words))
    few, many = (peak(rows_of(count, words)) for count in (101, 9025))
    assert many[1] > 50 * few[1]
    # All prompts and responses together are 4 MB.
    assert many[0] < few[0] + 2**20, (few, many)
