"""The scripts of exported folders, run as their users run them."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ALLOWED = {"json", "sys", "numpy", "onnxruntime", "tokenizers", "PIL", "re"}


def code_lines(script: str) -> list[str]:
    """Return the lines of a script that do something."""
    lines = re.sub('^""".*?"""\n', "", script, flags=re.DOTALL).splitlines()
    return [line for line in lines if line.strip() and not line.strip().startswith("#")]


def answers_of_script(folder: Path, texts: Sequence[str], *, said: str = "") -> list[dict[str, Any]]:
    """Run the script in a process without kdcli, torch and transformers, and return what it prints.

    said: what stands among its errors.
    """
    script = (folder / "predict.py").read_text()
    assert len(code_lines(script)) <= 20 and max(map(len, script.splitlines())) <= 120
    assert set(re.findall(r"^(?:from|import) (\w+)", script, re.MULTILINE)) <= ALLOWED
    command = [sys.executable, "-X", "importtime", str(folder / "predict.py"), *texts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]
    assert said in done.stderr and "UserWarning" not in done.stderr
    imported = set(re.findall(r"\| +(\w+)\n", done.stderr))
    assert "onnxruntime" in imported and not imported & {"torch", "transformers", "kdcli", "scipy", "datasets"}
    return [json.loads(line) for line in done.stdout.splitlines()]
