"""The option `divergence`: how a method compares predictions, and where it cannot."""

from typing import Any

import pytest

from kdcli.errors import InputError
from kdcli.methods import registry
from kdcli.methods.base import Context, Stage
from kdcli.methods.layer_maps import uniform
from kdcli.models.shape import ModelShape
from kdcli.objectives.distribution import Categorical
from kdcli.objectives.output import OutputObjective
from kdcli.objectives.term import Divergence
from kdcli.tasks import registry as kinds

SHAPE = ModelShape("llama", 4, 32, 4, 4, 8, 64, 220, 128)


def stages(kind: str, **options: Any) -> list[Stage]:
    method = registry.get("kd")
    chosen = method.options.model_validate(options)
    context = Context(SHAPE, SHAPE, "depth", kinds.get(kind), uniform(4, 4))
    method.check(chosen, context)
    return method.build(chosen, context)


@pytest.mark.parametrize("kind", ["classification", "causal-lm", "text", "token-classification"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Divergence()),
        ({"divergence": "reverse-kl"}, Divergence("reverse-kl")),
        ({"divergence": "js", "beta": 0.3}, Divergence("js", beta=0.3)),
        ({"divergence": "skew-kl"}, Divergence("skew-kl", skew=0.1)),
        ({"divergence": "skew-reverse-kl", "skew": 0.2}, Divergence("skew-reverse-kl", skew=0.2)),
    ],
)
def test_predictions_are_compared_as_the_recipe_says(kind: str, options: dict[str, Any], expected: Divergence):
    (stage,) = stages(kind, alpha=0.75, temperature=2.0, **options)
    (output,) = [term for term in stage.terms if term.name == "output"]
    assert isinstance(output.objective, OutputObjective) and output.weight == 0.75
    assert isinstance(output.objective.distribution, Categorical)
    assert output.objective.distribution.comparison == expected
    assert output.objective.temperature == 2.0


@pytest.mark.parametrize("kind", ["regression", "multi-label", "sentence-embedding"])
def test_what_predicts_no_classes_has_the_usual_comparison(kind: str):
    options = {} if kind == "sentence-embedding" else {"alpha": 0.5}
    stages(kind, **options)
    with pytest.raises(InputError, match="reverse-kl compares distributions over classes"):
        stages(kind, divergence="reverse-kl", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.5}, "beta has no effect beside divergence kl"),
        ({"divergence": "skew-kl", "beta": 0.5}, "beta has no effect beside divergence skew-kl"),
        ({"divergence": "js", "skew": 0.1}, "skew has no effect beside divergence js"),
    ],
)
def test_options_of_another_divergence_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        stages("classification", **options)
