"""Crops show the boxes where they are, sheets show every card, and no name becomes markup."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from drmm_hf.visualization.contact_sheet import ANNOTATED, SUGGESTED, Card, contact_sheet, crop, html_sheet


ORANGE, BLUE = (tuple(bytes.fromhex(shade[1:])) for shade in (ANNOTATED, SUGGESTED))


def extent(image, shade):
    """Return left, top, right, bottom of the pixels of a colour."""
    rows, columns = np.nonzero((np.asarray(image) == shade).all(axis=-1))
    return np.array([columns.min(), rows.min(), columns.max(), rows.max()])


def test_boxes_are_drawn_where_they_are():
    picture = Image.new("RGB", (400, 300), "white")
    drawn = crop(picture, [100.0, 100.0, 100.0, 50.0], [150.0, 100.0, 50.0, 100.0])
    assert drawn.size == (240, 240) and picture.getcolors() == [(400 * 300, (255, 255, 255))]
    # The union is 100 x 100 about (150, 150); with its margin the crop shows 160 pixels from (70, 70).
    assert extent(drawn, ORANGE) == pytest.approx(np.array([30, 30, 130, 80]) * 1.5, abs=3)
    assert extent(drawn, BLUE) == pytest.approx(np.array([80, 30, 130, 130]) * 1.5, abs=6)


@pytest.mark.parametrize(("given", "absent"), [("annotated", BLUE), ("suggested", ORANGE)])
def test_either_box_may_be_missing(given, absent):
    drawn = np.asarray(crop(Image.new("RGB", (60, 40)), **{given: [10.0, 10.0, 20.0, 20.0]}))
    assert not (drawn == absent).all(axis=-1).any()
    with pytest.raises(ValueError, match="at least one box"):
        crop(Image.new("RGB", (60, 40)))


@pytest.mark.parametrize("box", [[-30.0, -20.0, 50.0, 50.0], [500.0, 500.0, 4.0, 4.0], [10.0, 10.0, 0.0, 0.0]])
def test_boxes_beyond_the_picture_or_without_size_are_drawn_too(box):
    drawn = crop(Image.new("L", (60, 40), 255), box)
    assert drawn.size == (240, 240) and (np.asarray(drawn) == ORANGE).all(axis=-1).any()


def test_a_sheet_holds_every_card_and_cuts_long_lines():
    cards = [Card(Image.new("RGB", (240, 240), (index, 7, 9)), ["title", "x" * 500]) for index in range(7)]
    sheet = contact_sheet(cards, columns=3)
    colours = {colour for _, colour in sheet.getcolors(1 << 24)}
    assert {(index, 7, 9) for index in range(7)} <= colours
    assert sheet.width == 3 * 250 + 10
    # The long line ends where its card does: the gap behind the last column is white from top to bottom.
    assert (np.asarray(sheet)[:, -9:] == 255).all()
    assert contact_sheet(cards[:1]).width < sheet.width
    assert ORANGE in {colour for _, colour in contact_sheet(cards).getcolors(1 << 24)}
    without = contact_sheet(cards, annotated=False)  # no legend of what is not drawn
    colours = {colour for _, colour in without.getcolors(1 << 24)}
    assert ORANGE not in colours and BLUE in colours
    with pytest.raises(ValueError, match="cards is empty"):
        contact_sheet([])


def test_the_page_is_whole_and_names_are_text():
    card = Card(Image.new("RGB", (240, 240), "red"), ['<script>alert("1")</script>', "a & b", "'\"><img>.jpg"])
    page = html_sheet("Audit of <things>", {"Worst & first": [card, card], "Empty": []}, ["1 < 2"], {"a<": "b>"})
    assert "<dt>a&lt;</dt><dd>b&gt;</dd>" in page and "<dl>" not in html_sheet("", {})
    assert page.count("<figure>") == 2 and page.count("<img ") == 2 and "<script" not in page
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;" in page and "a &amp; b" in page
    assert "Worst &amp; first" in page and "Audit of &lt;things&gt;" in page and "1 &lt; 2" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    picture = re.search(r'src="data:image/jpeg;base64,([^"]+)"', page)[1]
    assert Image.open(io.BytesIO(base64.b64decode(picture))).size == (240, 240)
