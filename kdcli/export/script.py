"""The script that an exported folder gets: it needs ONNX Runtime and tokenizers, or Pillow, alone."""

from typing import TYPE_CHECKING, Any

from kdcli.models.processors import is_image_processor
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

IMAGE_HEAD = '''\
"""Answers as JSON lines: python {script} {usage}; needs onnxruntime, NumPy and Pillow only."""

{imports}
import numpy as np
from onnxruntime import InferenceSession
from PIL import Image, ImageOps

session = InferenceSession(f"{{sys.path[0]}}/model.onnx")


'''

NAMES = 'NAMES = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}\n'


def script_of(kind: TaskKind, fields: Any, config: "PretrainedConfig", processor: Any, max_length: int) -> str | None:
    """Return the script for a model's folder; None where its kind has none, or its tokenizer no tokenizer.json.

    fields: the kind's own. max_length: tokens of an input. Raises InputError, with the reason, where no script can make
    pixels as the image processor does.
    """
    of_images = is_image_processor(processor)
    if not of_images and not getattr(processor, "is_fast", False):
        return None
    decoding = kind.script(fields, config, processor, max_length if of_images else longest_input(processor, max_length))
    if decoding is None:
        return None
    needed = [name for name in kind.inputs(fields) if name not in kind.optional_inputs(fields)]
    usage = "".join(f"{name.upper()} " for name in needed) + "..."
    lines = decoding.splitlines(keepends=True)
    imports = ["import json\n", "import sys\n", *(line for line in lines if line.startswith("import "))]
    names = NAMES if "NAMES" in decoding else ""
    head = (IMAGE_HEAD if of_images else HEAD).format(
        script=SCRIPT, usage=usage, imports="".join(sorted(imports)), names=names
    )
    return head + "".join(line for line in lines if line not in imports)
