"""A few of the limits that `disk.py` tries by hand."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def may_mount(tmp_path: Path) -> None:
    """Skip where this user may not mount a file system."""
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not permitted")
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["distill", "overparam", "export"])
def test_a_full_disk_is_told_as_one_and_the_command_goes_on_to_the_same_files(command: str, may_mount: None):
    script = Path(__file__).parent / "disk.py"
    limits = ["--sizes", "4", "--inodes", "3"] if command == "distill" else ["--sizes", "2", "--inodes", "2"]
    done = subprocess.run(
        [sys.executable, str(script), "--command", command, *limits], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exit 3" in done.stdout
