"""Rows that are too many for memory: the same rows, in a file without a name."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from families import tokenizer

from kdcli.data.rows import array_of, stored, values_of
from kdcli.errors import RunError
from kdcli.tasks.encode import encode


def batches(count: int, width: int = 1000) -> list[pa.RecordBatch]:
    """Return `count` batches of a hundred rows, each `width` bytes wide."""
    return [
        pa.RecordBatch.from_pydict(
            {"number": pa.array(range(100 * i, 100 * (i + 1))), "text": [f"{100 * i + j}" * width for j in range(100)]}
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("count", [2, 60])
def test_rows_are_the_same_wherever_they_lie(count: int):
    rows = stored(iter(batches(count)))
    expected = pa.Table.from_batches(batches(count))
    assert len(rows) == 100 * count
    assert array_of(rows, "number").tolist() == list(range(100 * count))
    assert list(values_of(rows, "text")) == expected.column("text").to_pylist()
    chosen = rows.select(np.array([3, 100 * count - 1, 7]))
    assert chosen["number"][:] == [3, 100 * count - 1, 7] and chosen[1]["text"] == expected.column("text")[-1].as_py()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="shows in /proc")
def test_many_rows_lie_in_a_file_that_goes_with_the_process(own_cache: Path):
    rows = stored(iter(batches(60)))
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(own_cache) in line]
    assert mapped and all(line.endswith("(deleted)") for line in mapped)
    assert list(own_cache.iterdir()) == [] and len(rows) == 6000


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    (own_cache / "file").write_text("")
    monkeypatch.setenv("KDCLI_CACHE", str(own_cache / "file" / "below"))
    assert array_of(stored(iter(batches(60))), "number").tolist() == list(range(6000))


def test_a_full_disk_is_told_with_the_folder(own_cache: Path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(RunError, match="cannot write rows to") as caught:
            stored(iter(batches(60)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(own_cache) in caught.value.message and "KDCLI_CACHE" in str(caught.value.hint)


def test_encoding_in_batches_is_encoding_at_once():
    words = tokenizer()
    texts = [f"a {'fine ' * (i % 11)}film and {i}" for i in range(2345)]
    pairs = [f"dull {'so ' * (i % 7)}" for i in range(2345)]
    rows = Dataset.from_dict({"index": range(5, 2350), "text": texts, "text_pair": pairs, "label": [0.5] * 2345})
    encoded, once = encode(rows, words, 12), words(texts, pairs, truncation="longest_first", max_length=12)
    assert encoded["input_ids"][:] == once["input_ids"] and encoded["index"][:] == list(range(5, 2350))
    assert encoded["attention_mask"][:] == once["attention_mask"] and set(encoded["labels"]) == {0.5}
    assert encoded["length"][:] == [len(ids) for ids in once["input_ids"]]


GROWTH = """
import sys
from pathlib import Path
from families import tokenizer
from kdcli.recipe.schema import EvaluateSection, TaskSection
from kdcli.tasks.load import load_task
from kdcli.training.sampler import EpochSampler
from kdcli.data.rows import array_of

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(sys.argv[1]))

def run(name):
    task = load_task(TaskSection(name="own", data=name, text="text"), EvaluateSection(), base=Path())
    encoded = task.kind.prepare(task, words, 64)
    sampler = EpochSampler(array_of(encoded.train, "length"), 32, seed=0)
    return task, encoded, sum(1 for _ in sampler)

words = tokenizer()
run("few.csv")
before = resident()
kept = run("many.csv")
print(resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured in /proc")
@pytest.mark.parametrize(("what", "limit"), [("VmRSS", 0.4), ("VmHWM", 0.8)])
def test_a_row_takes_little_memory(what: str, limit: float, tmp_path: Path):
    rows = 200_000
    for name, count in (("few", 1000), ("many", rows)):
        lines = (f"a fine and moving film without number {i} in it,{'no' if i % 2 else 'yes'}" for i in range(count))
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "\n".join(lines))
    paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    found = subprocess.run(
        [sys.executable, "-c", GROWTH, what], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    # Kilobytes.
    assert int(found.stdout) < limit * rows, found.stdout
