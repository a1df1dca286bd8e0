"""Measure how far a model's boxes move when its pictures are padded further at the bottom and right.

Padding never moves the frame, but a convolutional network sees its border. Prints, for each padding, quantiles of
the largest move of a side (pixels of the picture) and of the score over all detections scoring 0.3 or more.

    python scripts/measure_padding_drift.py MODEL PICTURE_FOLDER
"""

import sys
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm

from drmm_hf import DrmmForObjectDetection, DrmmImageProcessor


@torch.no_grad()
def measure(model_folder: str, picture_folder: str, extras: tuple[int, ...] = (32, 64, 128), limit: int = 20):
    """Print the drift of boxes and scores, query by query.

    Args:
        model_folder (`str`): Folder of a trained model and its processor.
        picture_folder (`str`): Folder of pictures; the first `limit` by name are used.
        extras (`tuple[int, ...]`): Paddings to add, in pixels of the model input.
        limit (`int`): Most pictures to use.
    """
    model = DrmmForObjectDetection.from_pretrained(model_folder).eval()
    processor = DrmmImageProcessor.from_pretrained(model_folder)
    moves = {extra: [] for extra in extras}
    shifts = {extra: [] for extra in extras}
    paths = sorted(path for path in Path(picture_folder).iterdir() if path.suffix.lower() in {".jpg", ".png"})[:limit]
    for path in tqdm(paths):
        image = Image.open(path).convert("RGB")
        size = torch.tensor([image.width, image.height] * 2)
        inputs = processor(images=image, return_tensors="pt")
        plain = model(**inputs)
        scores = plain.logits.sigmoid()[0].max(-1).values
        kept = scores >= 0.3
        for extra in extras:
            padded = {name: F.pad(value, (0, extra, 0, extra)) for name, value in inputs.items()}
            moved = model(**padded)
            difference = (moved.pred_boxes - plain.pred_boxes)[0][kept].abs() * size
            moves[extra].append(difference.amax(-1))
            shifts[extra].append((moved.logits.sigmoid()[0].max(-1).values - scores)[kept].abs())
    quantiles = torch.tensor([0.5, 0.9, 0.99])
    for extra in extras:
        move, shift = torch.cat(moves[extra]), torch.cat(shifts[extra])
        shown = "  ".join(
            f"{int(100 * q)} %: {m:.2f} px, score {s:.3f}"
            for q, m, s in zip(quantiles, move.quantile(quantiles), shift.quantile(quantiles), strict=True)
        )
        print(f"{extra:>4} px of padding, {len(move)} detections: {shown}")


if __name__ == "__main__":
    measure(*sys.argv[1:3])
