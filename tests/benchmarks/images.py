"""The tables of image classification: a ViT teacher on cifar10_small, and students by every method that takes images.

Students have 3 of the teacher's 6 blocks, or low-rank factors of half of the block weights; each is trained plain, as
SVD chains and as MPO chains (+SVD, +OPDF). The teacher is used as it is (`--teacher`, made by image_teacher.py).

Sizes (a CPU only): every method sees the same images in as many steps, about a third of the training set once; the
scores are of the first 1,000 validation images, with a standard error of about 1.5 points.
"""

import json
import os
from pathlib import Path

from cells import Profile, Row, Size, Study

DEPTH, LOW_RANK = "Images: 3 of 6 blocks", "Images: half of the block weights as low-rank factors"
METHODS = ("kd", "hs", "minilmv2", "minilm", "tinybert", "makd", "theseus", "dbkd", "lgtm")
FORMS = {DEPTH: ("student.layers=3",), LOW_RANK: ("student.budget=0.5", "student.init_samples=256")}
CHAINS = {"": (), " +SVD": ('overparam.factorization="svd"',), " +OPDF, L = 1": ("overparam.length=1",)}


def _rows(table: str, suffix: str) -> list[Row]:
    fields = (*FORMS[table], *CHAINS[suffix])
    return [Row(table, f"`{name}`{suffix}", name, fields) for name in METHODS]


def _task() -> str:
    folder = Path(os.environ.get("KDCLI_DATA_DIR", "data")) / "cifar10_small"
    names = folder / "labels.json"
    labels = json.dumps(json.loads(names.read_text()) if names.is_file() else [])
    return (
        f'{{name="cifar10_small", type="image-classification", train="{folder}/train.parquet", '
        f'validation="{folder}/test.parquet", image="img", labels={labels}, validation_samples=1000}}'
    )


STAGES = tuple(tuple(_rows(table, suffix)) for suffix in CHAINS for table in FORMS)
IMAGES = Study(
    STAGES,
    {"cifar10_small": "cifar10_small, accuracy"},
    ("cifar10_small",),
    {table: next(row for row in STAGES[0] + STAGES[1] if row.table == table) for table in FORMS},
    Profile(
        {"cifar10_small": Size(6_400, 64, 1, 0, ("teacher.finetune=false",), _task())},
        (
            'train.select="last"',
            "train.eval_every=100000",
            "train.learning_rate=3e-4",
            'train.device="cpu"',
            "evaluate.batch_size=250",
        ),
        {},
    ),
    seeds=2,
    seeds_last=True,
)
