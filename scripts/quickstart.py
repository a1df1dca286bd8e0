"""Train on generated pictures, evaluate on unseen ones, then detect in one picture through the pipeline."""

import shutil
from pathlib import Path

from PIL import Image

from drmm_cli import main


ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "runs" / "quickstart"


def detect():
    """Run the pipeline of the trained model on a picture that it has not seen, and print its boxes."""
    from transformers import pipeline

    from drmm_hf.data.generated import generate_shapes

    picture = generate_shapes(num_images=1, seed=12345)[0]["image"]
    detector = pipeline("object-detection", model=str(OUTPUT / "best"))
    print(f"\nobjects in one new picture of {picture.width} x {picture.height} pixels:")
    for found in detector(picture, threshold=0.5):
        box = "  ".join(f"{side} {value}" for side, value in found["box"].items())
        print(f"{found['label']:>10} {found['score']:.2f}  {box}")


def shrink(path):
    """Make the picture of detections one for a page: under 150 kB."""
    with Image.open(path) as picture:
        picture.thumbnail((1000, 1000))
        picture.save(path, quality=75)


if __name__ == "__main__":
    shutil.rmtree(OUTPUT, ignore_errors=True)
    recipe = ROOT / "scripts" / "recipes" / "quickstart_generated.yaml"
    if main(["train", str(recipe), "--output", str(OUTPUT)]) == 0:
        detect()
        shrink(OUTPUT / "detections.jpg")
        print(f"\nmodel, pictures and figures: {OUTPUT.relative_to(ROOT)}/{{best, detections.jpg, summary.json, ...}}")
