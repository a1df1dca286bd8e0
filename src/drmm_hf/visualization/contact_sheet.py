"""Crops of many pictures on one sheet: two boxes each, the annotated and the suggested one."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont


# Okabe and Ito's, which the colour-blind can tell apart; the second is drawn in dashes as well.
ANNOTATED, SUGGESTED = "#e69f00", "#56b4e9"
_SIDE = 240  # of a crop, pixels
_MARGIN = 0.6  # around the boxes, in their longer side
_LEAST = 48  # side of the part of the picture that a crop shows at least, pixels


class Card(NamedTuple):
    """One crop and what is said below it.

    Attributes:
        image (`Image.Image`): Square crop.
        lines (`Sequence[str]`): The first is the title.
    """

    image: Image.Image
    lines: Sequence[str]


def crop(
    image: Image.Image, annotated: Sequence[float] | None = None, suggested: Sequence[float] | None = None
) -> Image.Image:
    """Cut out the neighbourhood of one or two boxes and draw them.

    Args:
        image (`Image.Image`): The picture; it is left as it is.
        annotated (`Sequence[float]`, *optional*): Its annotated box, xywh in pixels, drawn as a line.
        suggested (`Sequence[float]`, *optional*): Its suggested box, likewise, drawn in dashes.

    Returns:
        `Image.Image`: A square of 240 pixels; what lies beyond the picture is grey.

    Raises:
        ValueError: If there is neither box.
    """
    boxes = [np.asarray(box, dtype=float) for box in (annotated, suggested) if box is not None]
    if not boxes:
        raise ValueError("annotated and suggested are both None; the rule is at least one box.")
    corners = np.array([[*box[:2], *(box[:2] + box[2:])] for box in boxes])
    low, high = corners[:, :2].min(axis=0), corners[:, 2:].max(axis=0)
    side = max((high - low).max() * (1 + _MARGIN), _LEAST)
    origin = (low + high) / 2 - side / 2
    part = (*np.floor(origin).astype(int).tolist(), *np.floor(origin + side).astype(int).tolist())
    window = Image.new("RGB", (part[2] - part[0], part[3] - part[1]), "#8a8f98")
    inside = (max(part[0], 0), max(part[1], 0), min(part[2], image.width), min(part[3], image.height))
    if inside[0] < inside[2] and inside[1] < inside[3]:
        window.paste(image.convert("RGB").crop(inside), (inside[0] - part[0], inside[1] - part[1]))
    canvas = window.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(canvas)
    for box, shade, dashed in ((annotated, ANNOTATED, False), (suggested, SUGGESTED, True)):
        if box is not None:
            points = (np.array([*box[:2], box[0] + box[2], box[1] + box[3]]) - [*part[:2]] * 2) * _SIDE / window.width
            _rectangle(draw, points.tolist(), shade, dashed)
    return canvas


def contact_sheet(cards: Sequence[Card], columns: int = 6, annotated: bool = True) -> Image.Image:
    """Lay cards out in rows.

    Args:
        cards (`Sequence[Card]`): At least one.
        columns (`int`): Number of cards in a row.
        annotated (`bool`): Whether there are annotated boxes on them.

    Returns:
        `Image.Image`: One white sheet, with a line at its top that tells the kinds of boxes apart.

    Raises:
        ValueError: If there is no card.
    """
    if not cards:
        raise ValueError("cards is empty; a sheet needs at least one.")
    columns = min(columns, len(cards))
    font, gap, line = ImageFont.load_default(size=14), 10, 18
    height = _SIDE + line * max(len(card.lines) for card in cards) + 6
    rows, head = -(-len(cards) // columns), 30
    size = (columns * (_SIDE + gap) + gap, head + rows * (height + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    left = gap
    kinds = [("annotated", ANNOTATED, False), ("the model's", SUGGESTED, True)]
    for name, shade, dashed in kinds if annotated else kinds[1:]:
        draw.rectangle([left, 8, left + 26, 26], fill="#5a606a")
        _rectangle(draw, [left + 4, 11, left + 22, 23], shade, dashed)
        draw.text((left + 34, 17), name, font=font, fill="#2b2f36", anchor="lm")
        left += 44 + round(font.getlength(name)) + 16
    for index, card in enumerate(cards):
        left = gap + index % columns * (_SIDE + gap)
        top = head + gap + index // columns * (height + gap)
        sheet.paste(card.image, (left, top))
        for number, text in enumerate(card.lines):
            place = (left, top + _SIDE + 4 + number * line)
            draw.text(place, _shortened(text, font), font=font, fill="#2b2f36" if number == 0 else "#5a606a")
    return sheet


def html_sheet(
    title: str, sections: Mapping[str, Sequence[Card]], notes: Sequence[str] = (), legend: Mapping[str, str] = {}
) -> str:
    """Return cards as one page of html that needs no other file.

    Args:
        title (`str`): Of the page.
        sections (`Mapping[str, Sequence[Card]]`): By their heading.
        notes (`Sequence[str]`): Lines below the title.
        legend (`Mapping[str, str]`): Words that the cards use, and what they mean.

    Returns:
        `str`: The page. All text is escaped, pictures are within.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(note)}</p>" for note in notes)]
    parts.append('<p><span class="key a"></span> annotated <span class="key s"></span> the model\'s</p>')
    if legend:
        terms = "".join(f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>\n" for term, text in legend.items())
        parts.append(f"<dl>\n{terms}</dl>")
    for heading, cards in sections.items():
        parts.append(f"<h2>{html.escape(heading)}</h2>\n<div>")
        for card in cards:
            buffer = io.BytesIO()
            card.image.save(buffer, "JPEG", quality=85)
            data = base64.b64encode(buffer.getvalue()).decode()
            first, *rest = map(html.escape, card.lines)
            text = "<br>".join([f"<b>{first}</b>", *rest])
            source = f"data:image/jpeg;base64,{data}"
            parts.append(f'<figure><img src="{source}" alt="{first}"><figcaption>{text}</figcaption></figure>')
        parts.append("</div>")
    head = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    return "\n".join([f"{head}<style>{_STYLE}</style></head><body>", *parts, "</body></html>\n"])


_STYLE = f"""
body {{ font: 14px/1.4 system-ui, sans-serif; color: #2b2f36; margin: 2em; }}
p, dl {{ max-width: 70em; }}
dl {{ display: grid; grid-template-columns: max-content auto; gap: 2px 1em; }}
dt {{ font-weight: bold; }}
dd {{ margin: 0; }}
div {{ display: flex; flex-wrap: wrap; gap: 14px; }}
figure {{ margin: 0; width: {_SIDE}px; }}
figcaption {{ overflow-wrap: anywhere; }}
.key {{ display: inline-block; width: 18px; height: 12px; margin-left: 1em; }}
.a {{ border: 3px solid {ANNOTATED}; }}
.s {{ border: 3px dashed {SUGGESTED}; }}
"""


def _rectangle(draw: ImageDraw.ImageDraw, box: Sequence[float], shade: str, dashed: bool) -> None:
    """Draw a rectangle with dark edges, which shows on any picture."""
    x0, y0, x1, y1 = box
    corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]
    draw.line(corners, fill="black", width=5, joint="curve")
    for start, end in pairwise(corners):
        steps = max(1, round(math.dist(start, end) / 12)) if dashed else 1
        for step in range(steps):
            ends = [(step + part) / steps for part in ((0.2, 0.8) if dashed else (0, 1))]
            points = [(start[0] + (end[0] - start[0]) * t, start[1] + (end[1] - start[1]) * t) for t in ends]
            draw.line(points, fill=shade, width=3)


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Return a text that fits below a crop."""
    if font.getlength(text) <= _SIDE:
        return text
    while font.getlength(text + "...") > _SIDE:
        text = text[:-1]
    return text + "..."
