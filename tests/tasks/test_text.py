"""Plain text: where it is read from, how it is packed, and which words are hidden."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from families import tokenizer as make_tokenizer

from kdcli.distill.recipe import SCHEMAS
from kdcli.errors import InputError
from kdcli.recipe.check import problems_in
from kdcli.recipe.schema import EvaluateSection, TaskSection
from kdcli.tasks.base import Task
from kdcli.tasks.load import load_task
from kdcli.tasks.packing import IGNORED, Masker, TextCollator, mask_once, pack, token_counts


@pytest.fixture(scope="module")
def words() -> Any:
    return make_tokenizer()


def load(base: Path, **values: Any) -> Task:
    return load_task(TaskSection(name="plain", type="text", **values), EvaluateSection(), base=base)


def documents(count: int) -> list[str]:
    return [f"the film number {i} was good, and the actors were not bad at all ." for i in range(count)]


def test_a_folder_of_text_files_is_read_and_a_part_held_out(tmp_path: Path):
    for i, text in enumerate(documents(30)):
        (tmp_path / "in" / f"{i % 3}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / f"{i % 3}" / f"{i}.txt").write_text(text, encoding="utf-8")
    task = load(tmp_path, data="in")
    assert (len(task.train), len(task.selection)) == (27, 3) and task.kind.name == "text"
    assert sorted([*task.train["text"], *task.selection["text"]]) == sorted(documents(30))
    again = load(tmp_path, data="in")
    assert again.selection["text"][:] == task.selection["text"][:]
    assert load(tmp_path, data="in", split_seed=1).selection["text"][:] != task.selection["text"][:]


def test_files_named_after_splits_are_these_splits(tmp_path: Path):
    pa.parquet.write_table(pa.table({"text": documents(6)}), tmp_path / "train-00000.parquet")
    pa.parquet.write_table(pa.table({"text": ["held out ."]}), tmp_path / "validation.parquet")
    pa.parquet.write_table(pa.table({"text": ["for the end ."]}), tmp_path / "test.parquet")
    task = load(tmp_path, data=".")
    assert task.train["text"][:] == documents(6) and task.selection["text"][:] == ["held out ."]


def test_train_and_validation_files_and_another_column(tmp_path: Path):
    pa.parquet.write_table(pa.table({"body": documents(4)}), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("one held out document\n\nof two paragraphs", encoding="utf-8")
    task = load(tmp_path, train="a.parquet", validation="b.txt", text="body")
    assert task.train["text"][:] == documents(4)
    assert task.selection["text"][:] == ["one held out document\n\nof two paragraphs"]
    with pytest.raises(InputError, match="no text column 'bodi'; it has 'body'"):
        load(tmp_path, train="a.parquet", text="bodi")


def test_a_single_file_is_split_at_its_paragraphs(tmp_path: Path):
    (tmp_path / "book.txt").write_text("\n\n".join(documents(40)), encoding="utf-8")
    task = load(tmp_path, data="book.txt")
    assert (len(task.train), len(task.selection)) == (36, 4)
    (tmp_path / "line.txt").write_text("one single paragraph", encoding="utf-8")
    with pytest.raises(InputError, match="one single paragraph: nothing of it can be held out"):
        load(tmp_path, data="line.txt")


def test_the_data_folder_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "lm" / "plain").mkdir(parents=True)
    pa.parquet.write_table(pa.table({"text": documents(50)}), tmp_path / "lm" / "plain" / "train.parquet")
    monkeypatch.setenv("KDCLI_DATA_DIR", str(tmp_path))
    task = load(tmp_path, train_samples=10, validation_samples=2)
    assert (len(task.train), len(task.selection)) == (10, 2) and task.description["source"] == "lm/plain"
    monkeypatch.delenv("KDCLI_DATA_DIR")
    with pytest.raises(InputError, match="there is no text"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "has no text"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), "its bytes are not UTF-8"),
        ("absent.txt", None, "no file at"),
        ("numbers.csv", b"a,b\n1,2\n", "no text column 'text'"),
    ],
)
def test_unreadable_text_is_named(tmp_path: Path, name: str, content: bytes | None, words: str):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        load(tmp_path, data=name)


def problem_of(task: dict[str, Any], **tables: Any) -> str:
    """Return what is told of a recipe with a task, and further tables."""
    document = {"task": task, "method": "kd", "teacher": {"model": "x"}, **tables}
    return " and ".join(f"{problem.name}: {problem.message}" for problem in problems_in(document, SCHEMAS)[1])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"label": "x"}, 'task.label: type = "text" has no label'),
        ({"metrics": ["accuracy"]}, 'type = "text" has no metrics'),
        ({"test_samples": 3}, 'type = "text" has no test_samples'),
        ({"augment": {"model": "x"}}, 'keep their answers where words change; type = "text" has none'),
        ({"data": "a", "text": ["a", "b"]}, "one text column"),
    ],
)
def test_plain_text_has_no_labels(values: dict[str, Any], words: str):
    assert words in problem_of({"name": "plain", "type": "text", **values})


def test_finetune_tables_need_plain_text_and_tasks_with_labels():
    text = {"name": "plain", "type": "text"}
    assert 'follows distilling a general student: [task] type = "text"' in problem_of(
        {"name": "sst2"}, finetune=[{"task": "rte"}]
    )
    assert "finetune[0].task: a model is fine-tuned on a task with a score; type" in problem_of(
        text, finetune=[{"task": text}]
    )
    assert not problem_of(text, finetune=[{"task": "rte", "against": ["scratch"]}])
    assert "evaluate.fail_under" in problem_of(text, evaluate={"fail_under": 0.5})
    assert "export.onnx" in problem_of(text, export={"onnx": True})


def test_blocks_hold_every_token_in_order(words: Any):
    texts = documents(7)
    blocks = pack(texts, words, 24)
    inner = [token for row in blocks["input_ids"] for token in row[1:-1]]
    expected: list[int] = []
    for text in texts:
        expected += [*words(text, add_special_tokens=False)["input_ids"], words.sep_token_id]
    assert inner == expected[:-1]
    assert all(row[0] == words.cls_token_id and row[-1] == words.sep_token_id for row in blocks["input_ids"])
    assert set(blocks["length"][:-1]) == {24} and blocks["length"][-1] <= 24
    assert all(len(mask) == length for mask, length in zip(blocks["attention_mask"], blocks["length"], strict=True))


def test_every_token_of_a_block_knows_its_document(words: Any):
    # Room for six tokens. A separator stands behind every document but the last, [CLS] and [SEP] around every block.
    blocks = pack(["the film was the film", "was the", "film was the"], words, 8)
    assert [words.decode(row) for row in blocks["input_ids"]] == [
        "[CLS] the film was the film [SEP] [SEP]",
        "[CLS] was the [SEP] film was the [SEP]",
    ]
    assert blocks["segments"][:] == [[0] * 8, [0, 0, 0, 0, 1, 1, 1, 1]]
    # A document goes on in the next block, which may begin with no more of it than the separator behind it.
    blocks = pack(["the film was the", "was the", "film was"], words, 6)
    assert [words.decode(row) for row in blocks["input_ids"]] == [
        "[CLS] the film was the [SEP]",
        "[CLS] [SEP] was the [SEP] [SEP]",
        "[CLS] film was [SEP]",
    ]
    assert blocks["segments"][:] == [[0] * 6, [0, 0, 1, 1, 1, 1], [0] * 4]


def test_too_short_blocks_and_text_without_tokens_are_refused(words: Any):
    with pytest.raises(InputError, match="leaves no room"):
        pack(documents(2), words, 3)
    with pytest.raises(InputError, match="no token"):
        pack([], words, 24)


def masked(words: Any, rows: int = 300, **masking: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    blocks = pack([*documents(rows), *["zebra quiz judge vex"] * 40], words, 32)
    counts = token_counts(blocks, len(words))
    masker = Masker(words, **masking, seed=1, counts=counts)
    shown, labels, original = [], [], []
    for row in blocks:
        ids = torch.tensor(row["input_ids"])
        one, answer = masker(ids, row["index"], 0)
        original.append(ids), shown.append(one), labels.append(answer)
    return torch.cat(original), torch.cat(shown), torch.cat(labels)


def test_fifteen_percent_are_asked_and_eighty_ten_ten_of_them_hidden(words: Any):
    original, shown, labels = masked(words)
    special = torch.isin(original, torch.tensor(words.all_special_ids))
    asked = labels != IGNORED
    assert not (asked & special).any()
    assert torch.equal(labels[asked], original[asked]) and torch.equal(shown[~asked], original[~asked])
    count = int((~special).sum())
    # Four standard deviations of a binomial draw.
    assert abs(asked.sum() / count - 0.15) < 4 * (0.15 * 0.85 / count) ** 0.5
    total = int(asked.sum())
    hidden = (shown[asked] == words.mask_token_id).float().mean()
    kept = (shown[asked] == original[asked]).float().mean()
    assert abs(hidden - 0.8) < 4 * (0.8 * 0.2 / total) ** 0.5
    # A random token is now and then the right one.
    assert abs(kept - 0.1) < 4 * (0.1 * 0.9 / total) ** 0.5 + 0.1 / 100
    assert not torch.isin(shown[asked & (shown != words.mask_token_id)], torch.tensor(words.all_special_ids)).any()


def test_smoothing_asks_for_rare_words_more_often_and_for_as_many_words(words: Any):
    original, _, labels = masked(words, smoothing=0.7)
    asked = labels != IGNORED
    special = torch.isin(original, torch.tensor(words.all_special_ids))
    count = int((~special).sum())
    assert abs(asked.sum() / count - 0.15) < 4 * (0.15 * 0.85 / count) ** 0.5
    occurs = torch.bincount(original[~special], minlength=len(words))[original]
    rare, frequent = (occurs < 0.2 * occurs.max()) & ~special, (occurs > 0.8 * occurs.max()) & ~special
    assert asked[rare].float().mean() > 1.5 * asked[frequent].float().mean()


def test_words_are_hidden_anew_each_epoch_and_the_same_for_the_same_seed(words: Any):
    blocks = pack(documents(20), words, 32)
    row = torch.tensor(blocks[0]["input_ids"])
    masker, other = Masker(words, 0.5, seed=1), Masker(words, 0.5, seed=2)
    first = masker(row, 0, 0)
    assert torch.equal(first[1], Masker(words, 0.5, seed=1)(row, 0, 0)[1])
    for different in (masker(row, 0, 1), masker(row, 1, 0), other(row, 0, 0)):
        assert not torch.equal(first[1], different[1])


def test_a_batch_names_its_positions(words: Any):
    blocks = pack(documents(20), words, 32)
    collator = TextCollator(words, Masker(words, seed=1))
    rows = [blocks[i] for i in (0, 1, len(blocks) - 1)]
    batch = collator(rows)
    labels = batch["labels"].flatten()
    assert batch["masked_positions"].tolist() == [i for i, label in enumerate(labels.tolist()) if label != IGNORED]
    assert len(batch["real_positions"]) == sum(row["length"] for row in rows)
    assert (labels[batch["attention_mask"].flatten() == 0] == IGNORED).all()
    assert batch["segments"].shape == batch["input_ids"].shape and batch["segments"].dtype == torch.long
    assert all(batch["segments"][i, : row["length"]].tolist() == row["segments"] for i, row in enumerate(rows))
    collator.begin_epoch(1)
    assert not torch.equal(collator(rows)["labels"], batch["labels"])


def test_held_out_words_do_not_depend_on_epoch_or_seed(words: Any, tmp_path: Path):
    (tmp_path / "t.txt").write_text("\n\n".join(documents(60)), encoding="utf-8")
    task = load(tmp_path, data="t.txt", max_length=32)
    one, two = (task.kind.prepare(task, words, 32, seed=seed) for seed in (1, 2))
    assert one.selection["labels"][:] == two.selection["labels"][:]
    rows = [one.selection[i] for i in range(len(one.selection))]
    before = one.collator(rows)
    one.collator.begin_epoch(3)
    after = one.collator(rows)
    assert torch.equal(before["labels"], after["labels"]) and torch.equal(before["input_ids"], after["input_ids"])
    hidden = mask_once(one.train, Masker(words, seed=0))
    assert hidden["segments"][:] == one.train["segments"][:]
    assert "labels" in hidden.column_names and len(hidden) == len(one.train)


def test_a_tokenizer_without_a_mask_is_refused(words: Any):
    class Maskless:
        mask_token_id = None

    with pytest.raises(InputError, match="no mask token"):
        Masker(Maskless(), seed=0)
