"""A part of what kill.py and corruption.py do at length when they are run by hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="these scripts fork"),
]


def check(script: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, str(HERE / script), *arguments], capture_output=True, text=True, timeout=1500, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


def test_killed_runs_go_on_to_the_same_files():
    assert "12 kills, 0 not resumed to the same files" in check("kill.py", "--kills", "12", "--seed", "3")


def test_damage_is_noticed_or_made_good():
    told = check("corruption.py", "--kinds", "augment,opdf", "--how", "flipped,removed")
    assert "wrong" not in told.splitlines()[-1]
