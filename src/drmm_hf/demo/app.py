"""The demo: give a picture, see its boxes, how sure each side is, and the density; two detectors side by side.

`drmm demo MODEL` opens it. In the folder that `drmm demo MODEL --space FOLDER` writes, this file is `app.py` of a
Space, and `models.json` beside it names the detectors.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


# Before gradio is imported: it would tell its makers of each start.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import numpy as np
from PIL import Image

from drmm_hf.data.loading import load_image
from drmm_hf.evaluation.likelihood import has_density
from drmm_hf.evaluation.predict import load_detector, predict
from drmm_hf.modeling.mixture import central_quantile, tail_freedom
from drmm_hf.visualization.density_picture import density_picture, mixture_of_result
from drmm_hf.visualization.draw_boxes import draw_boxes


INTERVAL = 0.9
TOP_K = 100
# Of the launch: fonts of the system, as those of the theme would come from the network.
OPTIONS = {
    "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    "footer_links": [],
}
_TITLE = "## What does the detector see?"
_HINT = (
    "A box is where the detector puts an object, and its score is how probable it finds that it is right. "
    f"With soft sides each side fades out over the interval that holds it with {INTERVAL:.0%} probability."
)


class Detector:
    """Find and show the objects in one picture at a time.

    Args:
        name (`str`): Folder or Hub id of any transformers object detector.
        device (`str`, *optional*): Where to run. By default a GPU if there is one.

    Attributes:
        name (`str`): What the page calls it.
        threshold (`float`): Where the slider starts: what is saved with the model, else 0.5.
    """

    def __init__(self, name: str, device: str | None = None) -> None:
        self.name = "/".join(Path(name).parts[-2:])  # as owner/name, or run/best
        self.model, self.processor = load_detector(name, device)
        self.config: Any = self.model.config
        saved = getattr(self.processor, "score_threshold", None)
        self.threshold = saved if isinstance(saved, float) else 0.5
        self.has_density = has_density(self.config)
        if self.has_density:
            self.freedom = tail_freedom(self.config.coordinate_distribution, self.config.student_t_freedom)

    def detect(self, image: Image.Image) -> dict[str, np.ndarray]:
        """Find the objects.

        Args:
            image (`PIL.Image.Image`): The picture.

        Returns:
            `dict[str, np.ndarray]`: Detections by falling score, in pixels of the picture; of a mixture every pair of
            query and class.
        """
        top_k = self.config.num_queries * self.config.num_labels if self.has_density else TOP_K
        rows = [{"image_id": 0, "image": image}]
        return predict(self.model, self.processor, rows, top_k=top_k, progress=False)[0]

    def draw(self, image: Image.Image, result: Mapping[str, Any], threshold: float, soft: bool) -> Image.Image:
        """Draw the boxes.

        Args:
            image (`PIL.Image.Image`): The picture.
            result (`Mapping`): From `detect`.
            threshold (`float`): Smallest score that is shown.
            soft (`bool`): Whether each side fades out over its interval, where the model knows one.

        Returns:
            `PIL.Image.Image`: The drawn picture.
        """
        shown = {name: values[:TOP_K][result["scores"][:TOP_K] >= threshold] for name, values in result.items()}
        if soft and self.has_density:
            reach = central_quantile(INTERVAL, self.freedom) * shown["box_scales"]
            shown["box_intervals"] = np.stack([shown["boxes"] - reach, shown["boxes"] + reach], axis=-1)
        return draw_boxes(image, shown, self.config.id2label, threshold=0)

    def table(self, result: Mapping[str, Any], threshold: float) -> list[list[Any]]:
        """Return a row a box: class, score and corners.

        Args:
            result (`Mapping`): From `detect`.
            threshold (`float`): Smallest score that is shown.

        Returns:
            `list[list]`: By falling score.
        """
        fields = (result[name][:TOP_K].tolist() for name in ("labels", "scores", "boxes"))
        return [
            [self.config.id2label[label], round(score, 3), *(round(side, 1) for side in box)]
            for label, score, box in zip(*fields, strict=True)
            if score >= threshold
        ]

    def density(self, image: Image.Image, result: Mapping[str, Any]) -> Image.Image | None:
        """Draw the density over boxes.

        Args:
            image (`PIL.Image.Image`): The picture.
            result (`Mapping`): From `detect`.

        Returns:
            `PIL.Image.Image`: The drawn picture; None for a model that has no density.
        """
        if not self.has_density:
            return None
        with tempfile.TemporaryDirectory() as folder:
            path = density_picture(image, mixture_of_result(result), Path(folder) / "density.png", self.freedom)
            return Image.open(path).convert("RGB")


def make_app(names: Sequence[str], device: str | None = None) -> gr.Blocks:
    """Build the page.

    Args:
        names (`Sequence[str]`): Detectors to show side by side, folders or Hub ids.
        device (`str`, *optional*): Where to run. By default a GPU if there is one.

    Returns:
        `gr.Blocks`: Call its `launch`, with `OPTIONS`.
    """
    detectors = [Detector(name, device) for name in names]
    has_density = any(one.has_density for one in detectors)
    with gr.Blocks(title="drmm-hf", analytics_enabled=False) as app:
        gr.Markdown(f"{_TITLE}\n{_HINT}")
        seen = gr.State()  # the picture, and what each detector found in it
        with gr.Row():
            picture = gr.Image(type="filepath", label="Picture", sources=["upload", "clipboard"], height=320)
            with gr.Column():
                threshold = gr.Slider(0, 1, detectors[0].threshold, step=0.01, label="Show scores of at least")
                soft = gr.Checkbox(has_density, label="Soft sides", visible=has_density)
        drawn, tables, densities = [], [], []
        with gr.Tab("Boxes"), gr.Row():
            for number, one in enumerate(detectors):
                with gr.Column():
                    drawn.append(gr.Image(label=one.name, interactive=False, elem_id=f"boxes-{number}"))
                    headers = ["class", "score", "left", "top", "right", "bottom"]
                    table = gr.Dataframe(headers=headers, interactive=False, max_height=260, elem_id=f"table-{number}")
                    tables.append(table)
        with gr.Tab("Density", visible=has_density):
            for number, one in enumerate(detectors):
                if one.has_density:
                    gr.Markdown(f"**{one.name}**")
                    densities.append(gr.Image(show_label=False, interactive=False, elem_id=f"density-{number}"))

        def look(path, threshold, soft):
            if path is None:
                return [None, *show(None, threshold, soft), *[None] * len(densities)]
            try:
                image = load_image({"image_id": 0, "image": Image.open(path)})
                found = [one.detect(image) for one in detectors]
            except (OSError, ValueError) as error:
                raise gr.Error(str(error)) from error
            pairs = zip(detectors, found, strict=True)
            clouds = [one.density(image, result) for one, result in pairs if one.has_density]
            return [(image, found), *show((image, found), threshold, soft), *clouds]

        def show(seen, threshold, soft):
            if seen is None:
                return [None] * (2 * len(detectors))
            image, found = seen
            pairs = list(zip(detectors, found, strict=True))
            pictures = [one.draw(image, result, threshold, soft) for one, result in pairs]
            return [*pictures, *(one.table(result, threshold) for one, result in pairs)]

        picture.change(look, [picture, threshold, soft], [seen, *drawn, *tables, *densities])
        for control in (threshold, soft):
            control.change(show, [seen, threshold, soft], [*drawn, *tables], show_progress="hidden")
    return app


if __name__ == "__main__":
    folder = Path(__file__).parent
    named = json.loads((folder / "models.json").read_text(encoding="utf-8"))
    # A folder beside this file, or an id on the Hub.
    make_app([str(folder / name) if (folder / name).is_dir() else name for name in named]).launch(**OPTIONS)
