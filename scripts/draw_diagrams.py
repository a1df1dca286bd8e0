"""Draw the diagrams of docs/concepts.md, Figures 1, 3, 4 and 5 of the paper in our own drawing, as SVG files.

Command: python scripts/draw_diagrams.py docs/images
"""

import math
import sys
from pathlib import Path


INK, PALE, LINE = "#2b2f36", "#eef1f5", "#9aa3ae"
BLUE, ORANGE, GREEN, RED = "#0072b2", "#e69f00", "#009e73", "#d55e00"
FONT = "font-family='DejaVu Sans, Verdana, Helvetica, Arial, sans-serif'"


class Drawing:
    """Collect shapes and write them as one SVG file.

    Args:
        width (`int`): In user units.
        height (`int`): Likewise.
    """

    def __init__(self, width: int, height: int):
        self.size, self.shapes = (width, height), []

    def box(self, x, y, width, height, text="", fill=PALE, stroke=LINE, colour=INK, size=13, dashed=False, bold=False):
        """Draw a rounded rectangle with lines of text in its middle."""
        dashes = " stroke-dasharray='5 4'" if dashed else ""
        self.shapes.append(
            f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='7' fill='{fill}' stroke='{stroke}' "
            f"stroke-width='1.5'{dashes}/>"
        )
        if text:
            lines = text.split("\n")
            top = y + height / 2 - (len(lines) - 1) * size * 0.65
            for index, line in enumerate(lines):
                self.text(x + width / 2, top + index * size * 1.3 + size * 0.35, line, size, colour, "middle", bold)

    def text(self, x, y, text, size=13, colour=INK, anchor="start", bold=False):
        """Write a line; `_{..}` and `^{..}` lower and raise what is in the braces."""
        weight = " font-weight='bold'" if bold else ""
        parts = text.replace("_{", "\0D").replace("^{", "\0U").replace("}", "\0E").split("\0")
        inside, shift = [parts[0]], 0
        for part in parts[1:]:
            kind, rest = part[0], part[1:]
            move = {"D": 3.5, "U": -5, "E": -shift}[kind]
            shift = 0 if kind == "E" else move
            small = "" if kind == "E" else f" font-size='{size * 0.75:.1f}'"
            gap = f" dx='{0.3 * size:.1f}'" if rest.startswith(" ") else ""  # a space here would be lost
            if rest:
                inside.append(f"<tspan dy='{move}'{gap}{small}>{rest.lstrip()}</tspan>")
        style = f"font-size='{size}' fill='{colour}' text-anchor='{anchor}'{weight}"
        self.shapes.append(f"<text x='{x}' y='{y}' {style}>{''.join(inside)}</text>")

    def arrow(self, *points, colour=INK, dashed=False):
        """Draw a line through points with a head at the last."""
        dashes = " stroke-dasharray='5 4'" if dashed else ""
        path = " ".join(f"{x},{y}" for x, y in points)
        self.shapes.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='1.6'{dashes}/>")
        (x0, y0), (x, y) = points[-2:]
        angle = math.atan2(y - y0, x - x0)
        corners = [(x, y)]
        corners += [(x - 9 * math.cos(angle + turn), y - 9 * math.sin(angle + turn)) for turn in (0.42, -0.42)]
        self.shapes.append(f"<polygon points='{' '.join(f'{a:.1f},{b:.1f}' for a, b in corners)}' fill='{colour}'/>")

    def curve(self, points, colour, width=2.0, dashed=False, fill="none"):
        """Draw a smooth line through many points."""
        dashes = " stroke-dasharray='6 4'" if dashed else ""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.shapes.append(
            f"<polyline points='{path}' fill='{fill}' stroke='{colour}' stroke-width='{width}'{dashes}/>"
        )

    def save(self, path: Path, title: str):
        """Write the file; the title is what a screen reader says."""
        width, height = self.size
        frame = f"viewBox='0 0 {width} {height}' width='{width}' height='{height}'"
        head = f"<svg xmlns='http://www.w3.org/2000/svg' {frame} role='img' {FONT}>"
        ground = f"<rect width='{width}' height='{height}' fill='white'/>"
        path.write_text("\n".join([head, f"<title>{title}</title>", ground, *self.shapes, "</svg>"]) + "\n")


def training() -> Drawing:
    """Draw Figure 1: training with and without matching."""
    d = Drawing(900, 300)
    for top, title in ((18, "Other end-to-end detectors"), (168, "D-RMM")):
        d.text(20, top + 10, title, 15, bold=True)
        d.box(20, top + 30, 90, 56, "picture")
        d.arrow((110, top + 58), (146, top + 58))
        d.box(146, top + 30, 110, 56, "network", "#dcebf6", BLUE)
        d.arrow((256, top + 58), (292, top + 58))
    d.box(292, 48, 130, 56, "predictions\nclass, box")
    d.arrow((422, 76), (458, 76))
    d.box(458, 38, 176, 76, "bipartite matching\nby a cost of hand-set\nweights (Hungarian)", "#fdf1d8", ORANGE)
    d.arrow((634, 60), (676, 46))
    d.arrow((634, 92), (676, 106))
    d.box(676, 22, 204, 46, "positive: w_{1} class +\nw_{2} L1 + w_{3} GIoU", "#fdf1d8", ORANGE, size=12)
    d.box(676, 84, 204, 44, "negative: background", "#fdf1d8", ORANGE, size=12)
    d.box(292, 198, 130, 56, "mixture density\nπ, μ, γ, p", "#dcebf6", BLUE, size=12.5)
    d.arrow((422, 226), (458, 226))
    d.box(458, 198, 176, 56, "likelihood of each\nground truth", "#d9f1e9", GREEN)
    d.arrow((634, 214), (676, 202))
    d.arrow((634, 238), (676, 252))
    d.box(676, 180, 204, 44, "NLL: sum over all", "#d9f1e9", GREEN, size=12)
    d.box(676, 234, 204, 44, "MCM: largest over sum", "#d9f1e9", GREEN, size=12)
    return d


def stages() -> Drawing:
    """Draw Figure 3: the stages of the decoder."""
    d = Drawing(980, 290)
    d.box(20, 26, 100, 50, "picture X")
    d.arrow((120, 51), (150, 51))
    d.box(150, 26, 130, 50, "backbone, neck", "#dcebf6", BLUE)
    d.text(400, 44, "feature maps", 12.5)
    d.curve([(280, 51), (930, 51)], INK, 1.6)
    d.text(118, 114, "predefined", 12.5)
    d.text(118, 130, "boxes b_{1}", 12.5)
    d.arrow((196, 118), (255, 118))
    for number, left in enumerate((255, 505, 755), start=1):
        middle = left + 65
        d.arrow((middle, 51), (middle, 96))
        d.box(left, 96, 130, 44, f"RoI align: h_{{{number}}}", "#fdf1d8", ORANGE)
        d.arrow((middle, 140), (middle, 166))
        d.box(left, 166, 130, 44, f"head of stage {number}", "#dcebf6", BLUE)
        d.arrow((middle, 210), (middle, 236))
        d.text(middle, 256, f"M_{{{number}}} = π, μ, γ, p, o", 12.5, anchor="middle")
        if number < 3:
            d.arrow(
                (left + 130, 188), (left + 170, 188), (left + 170, 118), (left + 250, 118), colour=RED, dashed=True
            )
            d.text(left + 177, 158, f"b_{{{number + 1}}} = μ_{{{number}}}", 12, RED)
    d.text(896, 156, "... six in all", 12.5)
    d.text(118, 281, "dashed: boxes pass to the next stage without gradient; the loss is summed over all stages", 12)
    return d


def head() -> Drawing:
    """Draw Figure 4: the head."""
    d = Drawing(900, 330)
    d.text(20, 138, "RoI feature h", 13)
    d.arrow((112, 134), (150, 134))
    d.box(150, 40, 130, 212, "dynamic head\n\nstage, then\na branch for\nboxes and one\nfor classes", "#dcebf6", BLUE)
    rows = [
        (48, "delta", "+ input box b", "location μ", BLUE),
        (104, "raw scale", "softplus", "scale γ", BLUE),
        (160, "class logits", "softmax over classes", "class probability p", GREEN),
        (216, "objectness logit", "sigmoid", "objectness o", GREEN),
    ]
    for top, raw, function, result, colour in rows:
        d.arrow((280, top + 16), (418, top + 16))
        d.text(349, top + 10, raw, 12, anchor="middle")
        d.box(418, top, 160, 32, function, "white", colour, size=12.5)
        d.arrow((578, top + 16), (620, top + 16))
        d.text(628, top + 21, result, 13, colour, bold=True)
    d.text(20, 28, "input box b", 13)
    d.arrow((100, 24), (498, 24), (498, 48))
    d.arrow((668, 242), (668, 272))
    d.box(598, 272, 190, 32, "o_{k} / sum of o", "white", ORANGE, size=12.5)
    d.arrow((788, 288), (820, 288))
    d.text(828, 293, "mixing π", 13, "#a87100", bold=True)
    d.text(418, 293, "confidence: p · o", 13, bold=True)
    return d


def components() -> Drawing:
    """Draw Figure 5: what the MCM loss compares, with two ground truths in one dimension."""
    d = Drawing(900, 320)
    left, right, base, scale = 60, 840, 262, 250.0
    parts = [(3.0, 0.42, 0.34), (3.55, 0.5, 0.20), (7.0, 0.42, 0.40)]  # location, scale and weight of Cauchy densities

    def density(x, location, width, weight):
        return weight / (math.pi * width * (1 + ((x - location) / width) ** 2))

    def across(function):
        values = [index / 40 for index in range(401)]
        return [(left + x / 10 * (right - left), base - scale * 1.9 * function(x)) for x in values]

    d.curve([(left, base), (right, base)], INK, 1.4)
    for part in parts:
        d.curve(across(lambda x, part=part: density(x, *part)), ORANGE, 1.8, dashed=True)
    d.curve(across(lambda x: sum(density(x, *part) for part in parts)), BLUE, 2.6)
    for x, name, aside in ((3.25, "g_{1}", 1), (7.0, "g_{2}", 1)):
        place = left + x / 10 * (right - left)
        total = sum(density(x, *part) for part in parts)
        largest = max(density(x, *part) for part in parts)
        top, middle = base - scale * 1.9 * total, base - scale * 1.9 * largest
        d.curve([(place, base), (place, top)], LINE, 1.2, dashed=True)
        d.shapes.append(f"<circle cx='{place:.1f}' cy='{top:.1f}' r='5' fill='{BLUE}'/>")
        d.shapes.append(f"<circle cx='{place:.1f}' cy='{middle:.1f}' r='5' fill='{ORANGE}' stroke='white'/>")
        d.text(place, base + 22, name, 14, anchor="middle", bold=True)
        far = place + 92 * aside
        d.text(far, top - 4, f"p({name} | X)", 13, BLUE, bold=True)
        d.curve([(place + 7, top), (far - 5, top - 8)], BLUE, 1.0)
        d.text(far, middle + 22, f"max({name} | X)", 13, "#a87100", bold=True)
        d.curve([(place + 7, middle), (far - 5, middle + 18)], "#a87100", 1.0)
    d.text(left, 24, "density", 12.5)
    d.text(right, base + 22, "coordinate of a box", 12.5, anchor="end")
    d.curve([(left, base), (left, 32)], INK, 1.4)
    d.text(
        left,
        308,
        "blue: the mixture; dashed: its components. Two of them share g_{1}; MCM makes one explain it alone, as one "
        "does g_{2}.",
        12.5,
    )
    return d


def main(folder: str = "docs/images"):
    """Write the four diagrams."""
    for name, drawing, title in (
        ("figure_1_training", training(), "Training with matching, and by the likelihood of a mixture"),
        ("figure_3_stages", stages(), "Each stage pools features at the boxes of the stage before"),
        ("figure_4_head", head(), "From a query's feature and box to the parameters of its component"),
        ("figure_5_mcm", components(), "The largest component and the mixture at two ground truths"),
    ):
        drawing.save(Path(folder) / f"{name}.svg", title)


if __name__ == "__main__":
    main(*sys.argv[1:])
