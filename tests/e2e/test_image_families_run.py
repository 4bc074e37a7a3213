"""A student of every family that reads images: trained as chains of its factors, scored, and read by transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import IMAGES, tiny
from image_rows import put_images
from rich.console import Console
from transformers import AutoModelForImageClassification, ViTImageProcessor

from kdcli.distill.run import run_distill
from kdcli.models.probe import probe_batch
from kdcli.models.save import save_model
from kdcli.recipe.schema import Recipe
from kdcli.tasks.heads import load_model

pytestmark = pytest.mark.slow

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in IMAGES},
    "beit-biased": ("beit", {"use_relative_position_bias": True}),
    "deit-distilled": ("deit", {"architectures": ["DeiTForImageClassificationWithTeacher"]}),
    "dinov2-gated": ("dinov2", {"use_swiglu_ffn": True}),
}
FORMS: dict[str, dict[str, Any]] = {
    "chains": {
        "student": {"form": "low-rank", "budget": 0.5},
        "overparam": {"factorization": "mpo", "length": 1},
    },
    "blocks": {"student": {"form": "depth", "layers": 1}},
    "projections": {"student": {"form": "width", "hidden_size": 16, "init": "projections"}},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", VARIANTS)
def test_a_student_is_distilled_scored_and_read_again(case: str, form: str, tmp_path: Path):
    family, settings = VARIANTS[case]
    recipe = put_images(tmp_path)
    names = dict(enumerate("abc"))
    numbers = {name: number for number, name in names.items()}
    teacher = tiny(family, labels=3, id2label=names, label2id=numbers, **settings)
    (tmp_path / "own").mkdir()
    save_model(teacher, tmp_path / "own", ViTImageProcessor(size={"height": 16, "width": 16}))
    recipe |= {"name": "run", "teacher": {"model": str(tmp_path / "own")}, **FORMS[form]}
    recipe["train"]["max_steps"] = 2
    record = run_distill(
        Recipe.model_validate(recipe),
        recipe_path=tmp_path / "recipe.toml",
        output=tmp_path / "out",
        console=Console(quiet=True),
    ).to_json()
    assert record["status"] == "done" and 0 <= record["student"]["score"] <= 1
    folder = tmp_path / "out" / "run" / "student"
    loaded, plain = load_model(folder), AutoModelForImageClassification.from_pretrained(folder)
    # Halves of larger models are of the library's own class there.
    assert type(plain).__name__ == type(loaded).__name__ == type(teacher).__name__
    batch = probe_batch(loaded)
    torch.testing.assert_close(plain(**batch).logits, loaded(**batch).logits, atol=1e-6, rtol=0)
