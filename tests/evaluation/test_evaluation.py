import numpy as np
import pytest
import torch
from families import tiny, tokenizer

from kdcli.evaluation.comparison import Comparison, compare, describe_model
from kdcli.evaluation.score import evaluate_model, primary_score
from kdcli.recipe.schema import EvaluateSection, TaskSection
from kdcli.tasks.encode import Collator, encode
from kdcli.tasks.load import load_task
from kdcli.tasks.predict import predict


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory):
    section = TaskSection(name="reviews", train_samples=20, validation_samples=50)
    return load_task(section, EvaluateSection(), base=tmp_path_factory.mktemp("task"))


def test_logits_come_in_the_order_of_the_data(task):
    model, words = tiny("bert"), tokenizer()
    data = encode(task.selection, words, 64)
    collator = Collator(words)
    together = predict(model, data, collator, batch_size=7)
    alone = np.concatenate([predict(model, data.select([i]), collator) for i in range(len(data))])
    assert together.shape == (50, 2)
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_prediction_leaves_a_training_model_in_training(task):
    model, words = tiny("bert").train(), tokenizer()
    data = encode(task.selection, words, 64)
    first = predict(model, data, Collator(words))
    assert model.training
    np.testing.assert_array_equal(first, predict(model, data, Collator(words)))


def test_scores_are_those_of_the_argmax(task):
    model, words = tiny("bert"), tokenizer()
    scores = evaluate_model(model, words, task)
    logits = predict(model, encode(task.selection, words, 128), Collator(words))
    assert scores["validation"]["accuracy"] == pytest.approx(
        (logits.argmax(1) == np.array(task.selection["label"])).mean()
    )


def test_the_score_of_several_sets_is_their_mean():
    assert primary_score({"matched": {"accuracy": 0.8}, "mismatched": {"accuracy": 0.6}}, "accuracy") == pytest.approx(
        0.7
    )


def test_a_comparison_survives_its_record(task):
    teacher, student = tiny("bert", layers=2), tiny("bert", layers=1)
    result = compare(
        task,
        teacher=describe_model(teacher, {"validation": {"accuracy": 0.9}}),
        student=describe_model(student, {"validation": {"accuracy": 0.81}}),
    )
    assert result.retention == pytest.approx(0.9)
    assert result.student.parameters == sum(p.numel() for p in student.parameters())
    assert result.student.megabytes == pytest.approx(4e-6 * result.student.parameters, abs=1e-3)
    assert Comparison.from_record(result.to_json()) == result


def test_a_teacher_at_zero_has_no_retention(task):
    model = tiny("bert")
    zero = describe_model(model, {"validation": {"accuracy": 0.0}})
    assert compare(task, teacher=zero, student=zero).retention is None


def test_a_full_row_of_padding_does_not_change_a_logit(task):
    model = tiny("bert")
    ids = torch.randint(5, 150, (2, 8))
    short = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    long = {k: torch.nn.functional.pad(v, (0, 24)) for k, v in short.items()}
    torch.testing.assert_close(model(**long).logits, model(**short).logits, atol=1e-5, rtol=1e-4)
