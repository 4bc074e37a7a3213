"""On a GPU: the losses of every method are those of a CPU, steps do not wait for the host, predictions run there."""

import json
import math
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import NAMES, tiny, tokenizer
from stages import batch_of, setting
from stages import rows as encoded_rows
from tiny_recipes import run_recipe, tiny_recipe, write_recipe
from transformers import AutoModelForMaskedLM, Trainer, TrainerCallback

from kdcli.data.reviews import LABELS, reviews
from kdcli.machine import computing_device
from kdcli.models.save import save_model
from kdcli.tasks.encode import Collator
from kdcli.tasks.predict import predict

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

METHODS = ["kd", "hs", "minilm", "minilmv2", "tinybert", "distilbert", "theseus", "lgtm", "dbkd", "adkd", "makd"]
PLAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CASES: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in METHODS},
    "emd": {"method": {"name": "hs", "layer_map": "emd"}},
    "chains": {"method": "makd", "overparam": {"length": 1}},
    "products": {"method": "kd", "overparam": {"factorization": "svd"}},
    "learning chains": {"method": "lgtm", "overparam": {"length": 1}},
    **{f"{name} on text": {"method": name, "task": "text"} for name in ("distilbert", "minilmv2", "od")},
    **{f"{name}, decoder": {"method": name, "task": "causal-lm"} for name in ("od", "hs", "minilmv2", "makd")},
    **{f"{name}, instruct": {"method": name, "task": "instruct"} for name in ("kd", "seqkd", "gkd", "minillm")},
    "reverse kl": {"method": {"name": "kd", "divergence": "reverse-kl"}, "task": "instruct"},
    "top tokens": {"method": {"name": "kd", "divergence": "js"}, "task": "causal-lm", "teacher": {"top_k": 16}},
    "chains, decoder": {"method": "makd", "task": "causal-lm", "overparam": {"length": 1}},
}
DRAWN = [name for name in CASES if name.startswith(("gkd", "minillm", "seqkd"))]
"""Those that train on text that a model draws: another device draws other text."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a classifier, a masked and a causal language model, and rows of text without and with labels."""
    folder = tmp_path_factory.mktemp("world")
    names = dict(enumerate(LABELS))
    teacher = tiny("bert", layers=4, id2label=names, label2id={v: k for k, v in names.items()}, **PLAIN)
    filler = AutoModelForMaskedLM.from_config(teacher.config)
    words = tokenizer()
    decoder = tiny("llama", layers=4, eos_token_id=words.sep_token_id, bos_token_id=None, max_position_embeddings=256)
    for name, model in (("teacher", teacher), ("filler", filler), ("decoder", decoder)):
        (folder / name).mkdir()
        if model is decoder:
            words.eos_token = words.sep_token
        save_model(model, folder / name, words)
    texts = reviews()["train"]["text"][:240]
    pairs = [{"instruction": text[:30], "response": text[30:50] or "yes"} for text in texts[:120]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    rows = "".join(f'"{text}",{LABELS[number % 2]}\n' for number, text in enumerate(texts))
    (folder / "rows.csv").write_text("text,label\n" + rows)
    (folder / "rows.txt").write_text("\n\n".join(texts))
    return folder


FILES = {
    None: ("rows.csv", "teacher"),
    "text": ("rows.txt", "filler"),
    "causal-lm": ("rows.txt", "decoder"),
    "instruct": ("rows.jsonl", "decoder"),
}
"""The rows and the model of a type of tasks."""


def distil(world: Path, folder: Path, case: str, **train: Any) -> dict[str, Any]:
    """Run a case in `folder` and return its document."""
    changes = dict(CASES[case])
    kind = changes.pop("task", None)
    data, model = FILES[kind]
    rows = {"data": str(world / data), **({"type": kind} if kind is not None else {"text": "text"})}
    if kind == "instruct":
        # The layout of its prompts alone has a hundred tokens of this vocabulary.
        rows |= {"max_length": 256, "max_prompt_length": 230}
    form = {"form": "low-rank", "budget": 0.5} if changes["method"] == "makd" else {"form": "depth", "layers": 2}
    source = str(world / model)
    if changes["method"] == "dbkd":
        # Cut from a teacher that is fine-tuned already, it would know more than its decisions.
        form = {"form": "checkpoint", "model": source, "layers": 2}
    recipe = tiny_recipe(
        "task",
        "teacher",
        "student",
        task={"name": "rows", "max_length": 32, "validation_fraction": 0.2, **rows},
        teacher={"model": source, "finetune": False, **changes.pop("teacher", {})},
        student=form,
        train={"max_steps": 6, "batch_size": 16, **train},
        **changes,
    )
    folder.mkdir(exist_ok=True)
    return run_recipe(write_recipe(folder / "recipe.toml", recipe))


def losses(record: dict[str, Any]) -> list[float]:
    return [entry["loss"] for stage in record["training"] for entry in stage["history"] if "loss" in entry]


@pytest.mark.parametrize(
    "case", ["kd", "dbkd", "od on text", "od, decoder", *(pytest.param(name, marks=pytest.mark.slow) for name in DRAWN)]
)
def test_a_run_has_a_loss_a_step(case: str, world: Path, tmp_path: Path):
    """Without a GPU, too: what the tests below compare is there."""
    found = losses(distil(world, tmp_path, case, log_every=1))
    assert len(found) == 6 and all(map(math.isfinite, found))


@on_a_gpu
@pytest.mark.parametrize("case", CASES)
def test_the_losses_are_those_of_a_cpu(case: str, world: Path, tmp_path: Path):
    found = {
        device: losses(distil(world, tmp_path / device, case, device=device, log_every=1)) for device in ("cpu", "cuda")
    }
    assert len(found["cuda"]) == 6 and all(map(math.isfinite, found["cuda"]))
    if case in DRAWN:
        return
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-3, abs=1e-6)


@on_a_gpu
def test_a_low_rank_student_starts_from_a_teacher_that_was_just_trained_there(world: Path, tmp_path: Path):
    rows = {"name": "rows", "data": str(world / "rows.csv"), "text": "text", "validation_fraction": 0.2}
    tuning = {"model": str(world / "teacher"), "finetune": {"max_steps": 2}}
    recipe = tiny_recipe(
        "task", "teacher", "student", task=rows, teacher=tuning, student={"budget": 0.5}, method="makd"
    )
    record = run_recipe(write_recipe(tmp_path / "recipe.toml", recipe), "train.device=cuda")
    assert record["status"] == "done"


SWITCH = torch.cuda.set_sync_debug_mode.__name__


class Steps(TrainerCallback):
    """Collects where a GPU is waited for, from the second step of a stage to the one before its last."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        inside = 1 <= state.global_step < state.max_steps - 1
        torch.cuda.set_sync_debug_mode("warn" if inside else "default")

    @contextmanager
    def watch(self) -> Iterator[None]:
        def note(message: Any, *_: Any, **__: Any) -> None:
            if "synchronizing" not in str(message):
                return
            callers = traceback.extract_stack()
            # The library looks for padding in every mask; and to turn the watch on is itself warned of.
            if not any("masking_utils" in caller.filename or caller.name == SWITCH for caller in callers):
                self.found.append("".join(traceback.format_list(callers[-8:-2])))

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
@pytest.mark.parametrize("case", [name for name in CASES if name not in ("emd", *DRAWN)])
def test_steps_do_not_wait_for_the_gpu(case: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    steps, begin = Steps(), Trainer.__init__

    def begin_watched(self: Any, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        self.add_callback(steps)

    monkeypatch.setattr(Trainer, "__init__", begin_watched)
    with steps.watch():
        record = distil(world, tmp_path, case, device="cuda", log_every=100)
    assert record["training"] and not steps.found, steps.found[0]


@on_a_gpu
@pytest.mark.parametrize("family", NAMES)
def test_predictions_run_on_the_gpu_and_the_model_comes_back(family: str):
    model = tiny(family)
    data, collator = encoded_rows(40), Collator(tokenizer())
    places = []
    model.base_model.register_forward_hook(lambda *_: places.append(next(model.parameters()).device.type))
    there, here = (predict(model, data, collator, device=place)["logits"] for place in ("auto", "cpu"))
    assert places == ["cuda", "cpu"] and computing_device("auto") == "cuda:0"
    torch.testing.assert_close(torch.as_tensor(there), torch.as_tensor(here), rtol=1e-4, atol=1e-4)
    # What was moved can be trained, on the CPU where it was.
    batch = batch_of(setting(model, None, data))
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.sum().backward()
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@on_a_gpu
def test_teacher_and_student_are_asked_on_the_device_of_the_recipe(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The teacher's logits of all training rows are most of what a fixed teacher costs."""
    from transformers import BertForSequenceClassification as Bert

    asked: Counter[str] = Counter()
    forward = Bert.forward

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        asked[options["input_ids"].device.type] += len(options["input_ids"])
        return forward(self, *arguments, **options)

    monkeypatch.setattr(Bert, "forward", watched)
    for wanted, other in (("cuda", "cpu"), ("cpu", "cuda")):
        monkeypatch.setenv("KDCLI_CACHE", str(tmp_path / "cache" / wanted))
        asked.clear()
        distil(world, tmp_path / wanted, "kd", device=wanted)
        # A model that was loaded is tried on a few tokens where it is.
        assert asked[wanted] > 300 > 8 > asked[other]


@on_a_gpu
def test_a_process_trains_on_one_gpu_however_many_there_are(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    one = losses(distil(world, tmp_path / "one", "kd", device="auto", log_every=1))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert losses(distil(world, tmp_path / "two", "kd", device="auto", log_every=1)) == one
