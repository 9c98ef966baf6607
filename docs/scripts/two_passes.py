"""Draw docs/figures/two_passes.svg, the two passes of a W2R2 step: ``python docs/scripts/two_passes.py [FILE]``."""

from __future__ import annotations

import sys
from pathlib import Path

BOXES = {
    "frames": (20, 150, 92, 56, "video frames", "", "#eceff1"),
    "vision": (150, 70, 130, 56, "vision tower", "frozen", "#cfd8dc"),
    "vggt": (150, 230, 130, 56, "VGGT", "frozen", "#cfd8dc"),
    "merger": (320, 230, 130, 56, "geometry merger", "trained", "#c8e6c9"),
    "short": (500, 60, 220, 76, "LLM + LoRA: Phi(F2D, 0)", "shortcut pass, no gradient", "#ffe0b2"),
    "fused": (500, 220, 220, 76, "LLM + LoRA: Phi(F2D, F3D)", "fused pass, trained", "#c8e6c9"),
    "push": (780, 60, 200, 76, "push term", "active where s(shortcut) > mu", "#ffccbc"),
    "align": (780, 220, 200, 76, "cross-entropy", "on answer tokens", "#bbdefb"),
    "loss": (1030, 140, 90, 76, "loss", "", "#e1bee7"),
}
"""Name -> x, y, width, height, title, second line, fill colour."""
ARROWS = (
    ("frames", "vision", ""),
    ("frames", "vggt", ""),
    ("vggt", "merger", "F3D"),
    ("vision", "short", "F2D"),
    ("vision", "fused", ""),
    ("merger", "fused", ""),
    ("short", "push", "answer, s"),
    ("fused", "push", ""),
    ("fused", "align", ""),
    ("push", "loss", ""),
    ("align", "loss", ""),
)


def box(x: int, y: int, width: int, height: int, title: str, subtitle: str, fill: str) -> str:
    """A rounded rectangle with one or two centred lines of text."""
    middle, centre = x + width / 2, y + height / 2
    lines = [f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}" stroke="#455a64"/>']
    first = centre + (5 if not subtitle else -4)
    lines.append(f'<text x="{middle:g}" y="{first:g}" class="title">{title}</text>')
    if subtitle:
        lines.append(f'<text x="{middle:g}" y="{centre + 16:g}" class="small">{subtitle.replace(">", "&gt;")}</text>')
    return "\n".join(lines)


def arrow(start: str, end: str, label: str) -> str:
    """A straight arrow from the right side of one box to the left side of another."""
    x0, y0, width, height, *_ = BOXES[start]
    x1, y1, _, tall, *_ = BOXES[end]
    a, b, c, d = x0 + width, y0 + height / 2, x1 - 4, y1 + tall / 2
    text = f'<text x="{(a + c) / 2:g}" y="{(b + d) / 2 - 8:g}" class="small">{label}</text>' if label else ""
    ends = f'x1="{a}" y1="{b:g}" x2="{c}" y2="{d:g}"'
    return f'<line {ends} stroke="#455a64" stroke-width="1.6" marker-end="url(#head)"/>{text}'


def svg() -> str:
    """The whole figure."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1140 350" font-family="sans-serif">',
        "<title>The two passes of a W2R2 training step</title>",
        "<style>.title{font-size:15px;text-anchor:middle;fill:#212121}"
        ".small{font-size:12px;text-anchor:middle;fill:#455a64}</style>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#455a64"/></marker></defs>',
        '<rect width="1140" height="350" fill="#ffffff"/>',
        *(arrow(*each) for each in ARROWS),
        *(box(*each) for each in BOXES.values()),
        '<text x="570" y="335" class="small">Both passes share the weights and run in one engine forward. '
        "F2D and F3D are encoded once.</text>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "figures" / "two_passes.svg"
    file.write_text(svg())
    print(file)
