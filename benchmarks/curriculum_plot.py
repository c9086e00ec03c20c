"""Task probabilities over a real run, from its log.jsonl.

    python benchmarks/curriculum_plot.py assets/curriculum.png runs/linear/log.jsonl runs/adaptive/log.jsonl
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {"i2v": "#d62728", "t2v": "#ff7f0e", "it2v": "#8c564b",
           "predict_pre": "#1f77b4", "predict_post": "#17becf", "interpolate": "#2ca02c"}


def panel(draw, x0, log):
    """Stacked probabilities, 380 x 260 pixels, of one run."""
    rows = [json.loads(line) for line in Path(log).read_text().splitlines()]
    rows = [r for r in rows if r.get("stage") == "main" and r.get("mix")]
    last = rows[-1]["step"]
    for a, b in zip(rows, rows[1:]):
        y = 290
        for task, colour in COLOURS.items():
            top = y - 260 * a["mix"][task]
            draw.rectangle((x0 + 380 * a["step"] / last, top, x0 + 380 * b["step"] / last, y), fill=colour)
            y = top
    draw.text((x0, 12), f"{Path(log).parent.name}: {last} updates, {len(rows)} log lines", fill="#333333")
    draw.text((x0, 294), "0", fill="#333333")
    draw.text((x0 + 360, 294), str(last), fill="#333333")


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    logs = sys.argv[2:]
    image = Image.new("RGB", (20 + 400 * len(logs), 330), "white")
    draw = ImageDraw.Draw(image)
    for i, log in enumerate(logs):
        panel(draw, 10 + 400 * i, log)
    for i, (task, colour) in enumerate(COLOURS.items()):
        draw.rectangle((10 + 110 * i, 314, 20 + 110 * i, 324), fill=colour)
        draw.text((24 + 110 * i, 312), task, fill="#333333")
    image.save(sys.argv[1])


if __name__ == "__main__":
    main()
