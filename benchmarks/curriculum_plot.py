"""Task probabilities over a real run, from its log.jsonl.

    python benchmarks/curriculum_plot.py assets/curriculum.png runs/linear/log.jsonl runs/adaptive/log.jsonl
"""
import sys
from pathlib import Path

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train import read_log  # noqa: E402

COLOURS = ("#d62728", "#ff7f0e", "#8c564b", "#1f77b4", "#17becf", "#2ca02c", "#9467bd", "#e377c2", "#bcbd22")


def panel(draw, x0, log):
    """Stacked probabilities, 380 x 260 pixels, of one run -> its tasks."""
    rows = [row for (stage, _), row in read_log(log).items() if stage == "main"]
    last = rows[-1]["step"]
    for a, b in zip(rows, rows[1:]):
        y = 290
        for share, colour in zip(a["mix"].values(), COLOURS):
            left, right = (x0 + 380 * row["step"] / last for row in (a, b))
            draw.rectangle((left, y - 260 * share, right, y), fill=colour)
            y -= 260 * share
    draw.text((x0, 12), f"{Path(log).parent.name}: {last} updates, {len(rows)} log lines", fill="#333333")
    draw.text((x0, 294), f"0{last:>62}", fill="#333333")
    return list(rows[-1]["mix"])


def main(arguments=None):
    out, *logs = sys.argv[1:] if arguments is None else arguments
    image = Image.new("RGB", (max(680, 20 + 400 * len(logs)), 330), "white")
    draw = ImageDraw.Draw(image)
    for i, log in enumerate(logs):
        tasks = panel(draw, 10 + 400 * i, log)
    for i, (task, colour) in enumerate(zip(tasks, COLOURS)):
        draw.rectangle((10 + 110 * i, 314, 20 + 110 * i, 324), fill=colour)
        draw.text((24 + 110 * i, 312), task, fill="#333333")
    image.save(out)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main()
