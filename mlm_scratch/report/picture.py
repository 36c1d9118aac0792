"""loss.png: the losses over the steps, and the watched sentences."""

import math
import warnings
from pathlib import Path

from mlm_scratch.report.metrics import TRAINING, answer_curves, loss_curves, read_metrics

PICTURE = "loss.png"


def draw_losses(run_dir: Path) -> None:
    """Draw loss.png from metrics.jsonl: the losses over the steps, and the watched sentences."""
    import matplotlib  # half a second to import, needed once, at the very end

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_metrics(run_dir)
    watched = answer_curves(lines)
    rows, height = (2, 7.5) if watched else (1, 4.5)
    figure, panels = pyplot.subplots(
        rows, figsize=(8, height), layout="constrained", sharex=True, squeeze=False
    )
    losses = panels[0, 0]
    for label, points in loss_curves(lines).items():
        finite = [point for point in points if math.isfinite(point[1])]
        if finite:
            style = "-" if label == TRAINING else "o-"
            losses.plot(*zip(*finite, strict=True), style, label=label, markersize=4)
            losses.legend()
    losses.set(
        ylabel="loss (nats per masked token)", title=run_dir.resolve().name.replace("$", r"\$")
    )
    for text, points in watched.items():
        # Not TeX between dollars; and what begins with _ would be left out of the legend.
        label = "\N{ZERO WIDTH SPACE}" + text.replace("$", r"\$")
        panels[1, 0].plot(*zip(*points, strict=True), "o-", label=label, markersize=4)
        panels[1, 0].legend(fontsize="small")
        panels[1, 0].set(ylabel="probability of the answer", ylim=(-0.03, 1.03))
    for panel in panels[:, 0]:
        panel.grid(alpha=0.3)
    panels[-1, 0].set(xlabel="step")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # its font has no Chinese: boxes will do
        figure.savefig(run_dir / PICTURE, dpi=120)
    pyplot.close(figure)
