"""A fresh process in which importing drmm_hf fails, as on a machine that never heard of it."""

import os
import subprocess
import sys

import torch


_PROGRAM = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "drmm_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
*names, place, threads = sys.argv[1:]

import numpy as np, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForObjectDetection, pipeline

torch.set_num_threads(int(threads))
image = np.load(f"{place}/picture.npy")
answers = {}
for name in names:
    model = AutoModelForObjectDetection.from_pretrained(name, trust_remote_code=True).eval()
    processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=True)
    base = AutoModel.from_pretrained(name, trust_remote_code=True)
    inputs = processor(images=[image], return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    result = processor.post_process_object_detection(outputs, 0.05, [image.shape[:2]], interval=0.9)[0]
    detector = pipeline("object-detection", model=name, trust_remote_code=True, threshold=None)
    answers[name] = {
        "inputs": dict(inputs),
        "outputs": {name: value for name, value in outputs.items() if torch.is_tensor(value)},
        "result": result,
        "detections": detector(Image.fromarray(image), threshold=0.05),
        "above_saved": detector(Image.fromarray(image)),
        "modules": [type(part).__module__ for part in (model, processor, base)],
        "imported": sorted(name for name in sys.modules if name.partition(".")[0] == "drmm_hf"),
        "state": base.state_dict(),
    }
torch.save(answers, f"{place}/answers.pt")
"""


def answers_elsewhere(names, tmp_path, **variables) -> dict[str, dict]:
    """Load models in such a process and let them find objects in `tmp_path/picture.npy`.

    Args:
        names: Folders, or ids on the Hub.
        tmp_path: Holds the picture.
        **variables: Of the environment; the Hub is out of reach unless they say otherwise.

    Returns:
        `dict[str, dict]`: What each model gave.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"} | variables
    names = list(map(str, names))
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *names, str(tmp_path), str(torch.get_num_threads())],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "is not supported for object-detection" not in done.stderr
    answers = torch.load(tmp_path / "answers.pt")
    for answer in answers.values():
        assert answer["imported"] == []
        assert all(module.startswith("transformers_modules.") for module in answer["modules"])
    return answers
