import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from families import tiny, tokenizer

from kdcli.errors import InputError
from kdcli.evaluation.result import Loss, Result, Side, TaskScores
from kdcli.evaluation.score import describe_model, evaluate_model, primary_score
from kdcli.files import to_json_text
from kdcli.gates import Limits
from kdcli.recipe.schema import EvaluateSection, TaskSection
from kdcli.records import typed
from kdcli.tasks.encode import Collator, encode
from kdcli.tasks.load import load_task
from kdcli.tasks.metrics import is_error, shown
from kdcli.tasks.predict import predict


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory):
    section = TaskSection(name="reviews", train_samples=20, validation_samples=50)
    return load_task(section, EvaluateSection(), base=tmp_path_factory.mktemp("task"))


def test_logits_come_in_the_order_of_the_data(task):
    model, words = tiny("bert"), tokenizer()
    data = encode(task.selection, words, 64)
    collator = Collator(words)
    together = predict(model, data, collator, batch_size=7)["logits"]
    alone = np.concatenate([predict(model, data.select([i]), collator)["logits"] for i in range(len(data))])
    assert together.shape == (50, 2)
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_prediction_leaves_a_training_model_in_training(task):
    model, words = tiny("bert").train(), tokenizer()
    data = encode(task.selection, words, 64)
    first = predict(model, data, Collator(words))["logits"]
    assert model.training
    np.testing.assert_array_equal(first, predict(model, data, Collator(words))["logits"])


def test_scores_are_those_of_the_argmax(task):
    model, words = tiny("bert"), tokenizer()
    scores = evaluate_model(model, words, task)
    logits = predict(model, encode(task.selection, words, 128), Collator(words))["logits"]
    assert scores["validation"]["accuracy"] == pytest.approx(
        (logits.argmax(1) == np.array(task.selection["label"])).mean()
    )


def test_the_score_of_several_sets_is_their_mean():
    assert primary_score({"matched": {"accuracy": 0.8}, "mismatched": {"accuracy": 0.6}}, "accuracy") == pytest.approx(
        0.7
    )


def test_a_model_is_described_by_its_sizes_and_its_mean_score(task):
    model = tiny("bert", layers=1)
    side = describe_model(model, task, {"matched": {"accuracy": 0.9}, "mismatched": {"accuracy": 0.81}})
    assert side.score == pytest.approx(0.855)
    assert side.parameters == sum(p.numel() for p in model.parameters())
    assert side.megabytes == pytest.approx(4e-6 * side.parameters, abs=1e-3)
    assert describe_model(model) == Side(side.parameters, side.megabytes, {}, None)


SCORED = Side(80, 0.3, {"validation": {"accuracy": 0.9}}, 0.9)
RESULTS = {
    "scored": Result("accuracy", SCORED, Side(40, 0.2, {"validation": {"accuracy": 0.81}}, 0.81), {"validation": 50}),
    "black box": Result("accuracy", None, SCORED, {"validation": 50}),
    "by loss": Result(
        "loss",
        Side(80, 0.3, {}, None),
        Side(40, 0.2, {}, None),
        loss=Loss(2.5, None),
        finetune=[TaskScores("rte", "accuracy", {"student": [0.5, 0.7]}, {"student": [{"validation": {"f1": 1.0}}]})],
    ),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_a_result_survives_its_record(kind: str, tmp_path: Path):
    result = RESULTS[kind]
    document = {"name": "of the run", **json.loads(to_json_text(result.to_json()))}
    assert typed(Result, document, tmp_path) == result
    assert result.compression == (None if kind == "black box" else 2.0)
    assert result.retention == (pytest.approx(0.9) if kind == "scored" else None)
    del document["student"]["parameters"]
    with pytest.raises(InputError, match=r"has no field student\.parameters"):
        typed(Result, document, tmp_path)


def test_a_score_that_is_no_number_comes_back_as_none(tmp_path: Path):
    side = Side(80, 0.3, {"validation": {"pearson": math.nan}}, 0.0)
    read = typed(Side, json.loads(to_json_text(side.to_json())), tmp_path)
    assert math.isnan(read.metrics["validation"]["pearson"])


def test_a_teacher_at_zero_has_no_retention():
    zero = Side(80, 0.3, {"validation": {"accuracy": 0.0}}, 0.0)
    assert Result("accuracy", zero, zero).retention is None


def test_of_a_metric_where_less_is_better_a_student_keeps_the_teachers_over_its_own():
    teacher, student = (Side(80, 0.3, {"validation": {"perplexity": value}}, value) for value in (12.0, 15.0))
    result = Result("perplexity", teacher, student)
    assert result.retention == pytest.approx(0.8)
    limits = Limits(score=14.0, retention=0.75)
    score, retention = limits.gates(result.primary, 15.0, result.retention, error=is_error(result.primary))
    assert (score.passed, retention.passed) == (False, True) and score.message == "perplexity 15 is above 14"
    assert (shown("perplexity", 15.0), shown("rouge_l", 0.25)) == ("15.000", "25.00")


def test_a_full_row_of_padding_does_not_change_a_logit(task):
    model = tiny("bert")
    ids = torch.randint(5, 150, (2, 8))
    short = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    long = {k: torch.nn.functional.pad(v, (0, 24)) for k, v in short.items()}
    torch.testing.assert_close(model(**long).logits, model(**short).logits, atol=1e-5, rtol=1e-4)
