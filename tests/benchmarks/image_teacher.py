"""A ViT trained on cifar10_small in plain PyTorch: the teacher of the tables of images, as a user brings one.

    KDCLI_DATA_DIR=... python tests/benchmarks/image_teacher.py FOLDER

811,146 parameters: 6 blocks of width 128, patches of 4 x 4. 16 epochs, AdamW at 1.5e-3 with one cycle, random flips and
crops, labels smoothed by 0.1; the accuracy that is printed is that of 1,000 training images set aside. It takes about
half an hour of one core. FOLDER/start gets an untrained one of 3 blocks.
"""

import argparse
import copy
import io
import json
import os
import time
from pathlib import Path

import kdcli  # noqa: F401  (before torchvision: see kdcli/vision_operators.py)

# ruff: isort: split
import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

EPOCHS, BATCH, RATE, PADDING, HELD = 16, 128, 1.5e-3, 4, 1_000


def read(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (n, 3, 32, 32), uint8, and labels (n,)."""
    rows = pq.read_table(path).to_pylist()
    images = [np.array(Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB")) for row in rows]
    return torch.tensor(np.stack(images)).permute(0, 3, 1, 2), torch.tensor([row["label"] for row in rows])


def varied(images: torch.Tensor) -> torch.Tensor:
    """Return images moved by up to `PADDING` pixels, half of them flipped."""
    size = images.shape[-1]
    padded, found = torch.nn.functional.pad(images, (PADDING,) * 4), torch.empty_like(images)
    tops, lefts = torch.randint(0, 2 * PADDING + 1, (2, len(images)))
    for i, flips in enumerate(torch.rand(len(images)) < 0.5):
        part = padded[i, :, tops[i] : tops[i] + size, lefts[i] : lefts[i] + size]
        found[i] = part.flip(-1) if flips else part
    return found


def normalised(images: torch.Tensor) -> torch.Tensor:
    return (images.float() / 255 - 0.5) / 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    torch.manual_seed(0)
    data = Path(os.environ["KDCLI_DATA_DIR"]) / "cifar10_small"
    images, labels = read(data / "train.parquet")
    names = json.loads((data / "labels.json").read_text())
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    held, rows = order[:HELD], order[HELD:]
    config = ViTConfig(
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=32,
        patch_size=4,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    model = ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.05)
    steps = EPOCHS * (len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    begun = time.perf_counter()
    for epoch in range(1, EPOCHS + 1):
        model.train()
        for chosen in rows[torch.randperm(len(rows))].split(BATCH)[: len(rows) // BATCH]:
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(normalised(varied(images[chosen]))).logits
            torch.nn.functional.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            found = torch.cat([model(normalised(images[part])).logits.argmax(-1) for part in held.split(250)])
        accuracy = (found == labels[held]).float().mean()
        print(f"epoch {epoch}: {100 * accuracy:.1f} ({time.perf_counter() - begun:.0f} s)", flush=True)
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    start = copy.deepcopy(config)
    start.num_hidden_layers = 3
    for place, each in ((folder, model), (folder / "start", ViTForImageClassification(start))):
        each.save_pretrained(place)
        processor.save_pretrained(place)


if __name__ == "__main__":
    main()
