"""The script that an exported folder gets: it answers with the graph, by ONNX Runtime and tokenizers alone."""

from typing import TYPE_CHECKING, Any

from kdcli.tasks.encode import longest_input
from kdcli.tasks.kind import TaskKind

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SCRIPT = "predict.py"

HEAD = '''\
"""Answers as JSON lines: python {script} {usage}; needs onnxruntime and tokenizers only."""

{imports}
import numpy as np
from onnxruntime import InferenceSession
from tokenizers import Tokenizer

{names}tokenizer = Tokenizer.from_file(f"{{sys.path[0]}}/tokenizer.json")
session = InferenceSession(f"{{sys.path[0]}}/model.onnx")
'''


NAMES = 'NAMES = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}\n'


def script_of(kind: TaskKind, fields: Any, config: "PretrainedConfig", tokenizer: Any, max_length: int) -> str | None:
    """Return the script for a model's folder; None where its kind has none, or its tokenizer no tokenizer.json.

    fields: the kind's own. max_length: tokens of an input.
    """
    if not getattr(tokenizer, "is_fast", False):
        return None
    decoding = kind.script(fields, config, tokenizer, longest_input(tokenizer, max_length))
    if decoding is None:
        return None
    needed = [name for name in kind.inputs(fields) if name not in kind.optional_inputs(fields)]
    usage = "".join(f"{name.upper()} " for name in needed) + "..."
    lines = decoding.splitlines(keepends=True)
    imports = ["import json\n", "import sys\n", *(line for line in lines if line.startswith("import "))]
    names = NAMES if "NAMES" in decoding else ""
    head = HEAD.format(script=SCRIPT, usage=usage, imports="".join(sorted(imports)), names=names)
    return head + "".join(line for line in lines if line not in imports)
