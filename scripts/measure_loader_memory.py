"""Measure the memory of the processes that read pictures, over a data set much larger than what they hold.

    python scripts/measure_loader_memory.py [--streaming] [--rows 20000] [--workers 2]

Makes parquet files of noise pictures in a temporary folder, reads them once with the loader of `drmm train`, and
prints for each tenth of them what the workers take: resident memory, and the part of it that no other process shares.
"""

import argparse
import io
import tempfile
from pathlib import Path
from statistics import mean

import datasets
import numpy as np
import psutil
from datasets import ClassLabel, Features, List, Value
from PIL import Image

from drmm_hf.data.augmentation import build_augmentation
from drmm_hf.data.coco import categories, load_detection_dataset
from drmm_hf.data.labels import LabelMap
from drmm_hf.data.loading import DetectionDataset, data_loader
from drmm_hf.data.stream import StreamLoader
from drmm_hf.modeling.image_processing_drmm import DrmmImageProcessor


FILE_ROWS = 500


def write_parquet(folder: Path, num_rows: int, side: int) -> None:
    """Write noise pictures with one box each."""
    fields = {"bbox": List(Value("float64")), "category": ClassLabel(names=["noise"])}
    numbers = {name: Value("int64") for name in ("image_id", "width", "height")}
    features = Features({**numbers, "image": datasets.Image(), "objects": List(fields)})
    rng = np.random.default_rng(0)
    for start in range(0, num_rows, FILE_ROWS):
        rows = []
        for image_id in range(start, min(start + FILE_ROWS, num_rows)):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "JPEG")
            picture = {"bytes": file.getvalue(), "path": None}
            objects = [{"bbox": [1.0, 2.0, side / 2, side / 3], "category": 0}]
            rows.append({"image_id": image_id, "width": side, "height": side, "image": picture, "objects": objects})
        path = folder / "data" / f"train-{start // FILE_ROWS:05d}-of-{-(-num_rows // FILE_ROWS):05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows, features=features).to_parquet(path)


def main() -> None:
    """Parse, write, read, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streaming", action="store_true", help="read them as a stream")
    parser.add_argument("--rows", type=int, default=20000)
    parser.add_argument("--side", type=int, default=96, help="of a picture, pixels")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shuffle-buffer", type=int, default=1000)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        write_parquet(Path(folder), args.rows, args.side)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.parquet"))
        data = load_detection_dataset(folder, "train", bbox_format="xywh", streaming=args.streaming)
        label_map, augmentation = LabelMap.from_categories(categories(data)), build_augmentation("flip")
        processor = DrmmImageProcessor(size={"shortest_edge": args.side, "longest_edge": args.side})
        if args.streaming:
            options = {"augmentation": augmentation, "shuffle_buffer": args.shuffle_buffer}
            loader = StreamLoader(data, label_map, processor, 8, num_workers=args.workers, **options)
        else:
            dataset = DetectionDataset(data, label_map, augmentation)
            loader = data_loader(dataset, processor, 8, num_workers=args.workers)
        how = f"a stream in blocks of {args.shuffle_buffer}" if args.streaming else "a mapped data set"
        print(f"{args.rows} pictures in {size / 2**20:.0f} MiB of parquet, {how}, {args.workers} workers")
        print("pictures read  resident MiB  of its own MiB  (mean over workers)")
        read, step = 0, args.rows // 10
        for batch in loader:
            due, read = read // step, read + len(batch["labels"])
            if read // step > due or read == args.rows:
                memory = [child.memory_full_info() for child in psutil.Process().children()]
                resident, own = (mean(getattr(info, name) for info in memory) / 2**20 for name in ("rss", "uss"))
                print(f"{read:13d}  {resident:12.0f}  {own:14.0f}", flush=True)


if __name__ == "__main__":
    main()
