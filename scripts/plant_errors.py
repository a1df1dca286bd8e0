"""Plant errors in the annotations of a COCO file, to measure how well `drmm audit` finds them.

python scripts/plant_errors.py instances_train.json OUT/instances_train.json
writes the spoilt file, and beside it planted_errors.json, the record of what was done.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from drmm_hf.evaluation.planted_errors import plant_errors


def main() -> None:
    """Read, spoil, write, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", metavar="FILE", type=Path, help="COCO json file")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="where to write the spoilt one")
    parser.add_argument("--share", type=float, default=0.1, help="fraction of the boxes to spoil (default: 0.1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice (default: 0)")
    args = parser.parse_args()

    content = json.loads(args.annotations.read_text())
    spoilt, planted = plant_errors(content, args.share, args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(spoilt))
    args.output.with_name("planted_errors.json").write_text(json.dumps(planted))
    counts = Counter(entry["kind"] for entry in planted)
    print(f"{len(planted)} of {len(content['annotations'])} annotations spoilt: {dict(counts)}")


if __name__ == "__main__":
    main()
