"""What saving a model leaves on the screen and on the disk."""

from pathlib import Path

import pytest
from families import tiny
from transformers.utils import logging

from kdcli.models.save import save_model
from kdcli.models.student import build_student
from kdcli.recipe.schema import StudentSection


@pytest.mark.parametrize("form", ["plain", "low-rank"])
def test_saving_says_nothing_and_leaves_files_that_others_may_read(
    form: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    model = tiny("bert")
    if form == "low-rank":
        model = build_student(model, StudentSection(form="low-rank", rank=4), seed=0).model
    (tmp_path / "beside").touch()
    logging.enable_progress_bar()
    save_model(model, tmp_path)
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"] == modes["beside"]
