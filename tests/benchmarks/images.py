"""The tables of image classification: a ViT teacher on cifar10_small, and students by every method that takes images.

Students have 3 of the teacher's 6 blocks, or low-rank factors of half of the block weights; each is trained plain, as
SVD chains and as MPO chains (+SVD, +OPDF). The teacher is used as it is (`--teacher`, made by image_teacher.py); in its
folder `start` lies an untrained ViT of 3 blocks, from which the students of decisions alone (`dbkd`) begin.

Sizes (a CPU only): every method sees the same images in as many steps, about a third of the training set once; the
scores are of the first 1,000 validation images, with a standard error of about 1.5 points.
"""

import json
import os
from pathlib import Path

from cells import Profile, Row, Size, Study

DEPTH, LOW_RANK = "Images: 3 of 6 blocks", "Images: half of the block weights as low-rank factors"
METHODS = ("kd", "hs", "minilmv2", "minilm", "tinybert", "makd", "theseus")
SLOW = ("lgtm",)
"""A step of theirs costs six times as much as others': they come last."""
UNFIT = {(LOW_RANK, "theseus")}
"""Theseus trains blocks inside the teacher: none of factors."""
CHAINS = {"": (), " +SVD": ('overparam.factorization="svd"',), " +OPDF, L = 1": ("overparam.length=1",)}


def _student(table: str, method: str) -> tuple[str, ...]:
    """Return the changes of a recipe of recipes/methods, where `makd` has low-rank students and others have blocks."""
    if table == DEPTH:
        others = ("student.budget=", 'student.form="depth"') if method == "makd" else ()
        return (*others, "student.layers=3")
    others = ("student.layers=", 'student.form="low-rank"') if method != "makd" else ()
    return (*others, "student.budget=0.5", "student.init_samples=256")


def _rows(table: str, suffix: str, methods: tuple[str, ...]) -> list[Row]:
    return [
        Row(table, f"`{name}`{suffix}", name, (*_student(table, name), *CHAINS[suffix]))
        for name in methods
        if (table, name) not in UNFIT
    ]


def _decisions(suffix: str) -> list[Row]:
    """Return the row of dbkd, whose students have nothing of the teacher: they start at random."""
    student = ("student.layers=", 'student.form="checkpoint"', 'student.model="NEW"', "method.ratio=0.05")
    chains = (*CHAINS[suffix], "overparam.aux_weight=0") if suffix else ()
    return [Row(DEPTH, f"`dbkd`, from random weights{suffix}", "dbkd", (*student, *chains))]


def _task() -> str:
    folder = Path(os.environ.get("KDCLI_DATA_DIR", "data")) / "cifar10_small"
    names = folder / "labels.json"
    labels = json.dumps(json.loads(names.read_text()) if names.is_file() else [])
    return (
        f'{{name="cifar10_small", type="image-classification", train="{folder}/train.parquet", '
        f'validation="{folder}/test.parquet", image="img", labels={labels}, validation_samples=1000}}'
    )


STAGES = (
    *(tuple(_rows(table, suffix, METHODS)) for suffix in CHAINS for table in (DEPTH, LOW_RANK)),
    *(tuple(_decisions(suffix)) for suffix in CHAINS),
    *(tuple(_rows(table, suffix, SLOW)) for suffix in CHAINS for table in (DEPTH, LOW_RANK)),
)
IMAGES = Study(
    STAGES,
    {"cifar10_small": "cifar10_small, accuracy"},
    ("cifar10_small",),
    {table: next(row for stage in STAGES for row in stage if row.table == table) for table in (DEPTH, LOW_RANK)},
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
