"""The script that an exported folder gets: it answers with the graph, by ONNX Runtime and tokenizers alone."""

from typing import TYPE_CHECKING, Any

from kdcli.tasks.encode import longest_input
from kdcli.tasks.kind import TaskKind

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SCRIPT = "predict.py"

HEAD = '''\
"""Answers as JSON lines: python {script} {usage}. Needs onnxruntime and tokenizers only."""

import json
import sys

import numpy as np
from onnxruntime import InferenceSession
from tokenizers import Tokenizer

NAMES = {{"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}}
tokenizer = Tokenizer.from_file(f"{{sys.path[0]}}/tokenizer.json")
tokenizer.enable_padding(pad_id={pad})
session = InferenceSession(f"{{sys.path[0]}}/model.onnx")
'''


def script_of(kind: TaskKind, fields: Any, config: "PretrainedConfig", tokenizer: Any, max_length: int) -> str | None:
    """Return the script for a model's folder; None where its kind has none, or its tokenizer no tokenizer.json.

    fields: the kind's own. max_length: tokens of an input.
    """
    decoding = kind.script(fields, config, longest_input(tokenizer, max_length))
    if decoding is None or not getattr(tokenizer, "is_fast", False):
        return None
    usage = "".join(f"{name.upper()} " for name in kind.inputs(fields)) + "..."
    return HEAD.format(script=SCRIPT, usage=usage, pad=tokenizer.pad_token_id) + decoding
