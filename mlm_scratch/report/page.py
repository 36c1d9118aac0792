"""report.html: what a run learned, as one page without a network.

The curves are SVG; hold the mouse over a point to read it.
"""

import html
import math
from collections.abc import Iterable
from typing import Any

from mlm_scratch.report.metrics import answer_curves, evaluations, loss_curves
from mlm_scratch.report.watch import before_and_after, short

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 800, 260, 48, 28, 10, 28  # of a chart, in px
TICKS = 5
MAX_DOTS = 30  # of a curve; those of a longer one show under the mouse
COLOURS = ("#2f6fb0", "#c8641b", "#2c8f4e", "#8a4fa8", "#b03a48", "#6b7280")
STYLE = """
:root { color-scheme: light dark; --line: #8884; --text: #222; --back: #fff; --muted: #666 }
@media (prefers-color-scheme: dark) {
  :root { --text: #ddd; --back: #16181c; --muted: #999 }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
       max-width: 52rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem } h3 { font-size: 1rem }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--muted); font-size: 12px }
.wide svg { min-width: 34rem } td:first-child { min-width: 9rem }
.grid { stroke: var(--line) } .hit { fill: transparent } .hit:hover { fill: currentColor }
.legend span { margin-right: 1rem; white-space: nowrap } .legend i { display: inline-block;
       width: .8em; height: .8em; border-radius: 50%; margin-right: .3em }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem }
td, th { padding: .15rem .5rem; border-bottom: 1px solid var(--line); text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums }
td.cell { vertical-align: bottom; padding: .15rem .1rem } td.cell div { width: 1.4rem;
       min-height: 1px; border-radius: 2px 2px 0 0; margin: auto }
pre { overflow-x: auto; font-size: .85rem } dt { float: left; clear: left; width: 11rem;
       color: var(--muted) } dd { margin-left: 11.5rem }
"""

Points = list[tuple[int, float]]


def report_page(
    title: str,
    lines: list[dict[str, Any]],
    results: dict[str, Any],
    summary: list[str],
    first_row: list[str],
    facts: dict[str, dict[str, str]],
    command: str,
) -> str:
    """Return the page.

    Args:
        title: the name of the run.
        lines: those of metrics.jsonl.
        results: what Report.results returned.
        summary: lines on time, speed and what was learned.
        first_row: the lines that show the first row of the run, masked; may be empty.
        facts: what to list at the end, by section and name.
        command: the command line.
    """
    losses = loss_curves(lines)
    watched = answer_curves(lines)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        *(f"<p>{html.escape(line)}</p>" for line in summary),
        "<h2>Loss (nats per masked token)</h2>" + chart(losses),
    ]
    if watched:
        parts += [
            "<h2>Probability of the answer</h2>" + chart(watched, highest=1.0),
            "<h2>Watched sentences</h2>" + _watched_table(lines),
            "<h2>Before and after</h2>" + _fills_table(results),
        ]
    if first_row:
        text = html.escape("\n".join(first_row))
        parts.append(f"<h2>What the model sees</h2><pre>{text}</pre>")
    parts.append(f"<h2>Settings</h2><pre>{html.escape(command)}</pre>")
    for section, values in facts.items():
        listed = "".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
            for name, value in values.items()
        )
        parts.append(f"<h3>{html.escape(section)}</h3><dl>{listed}</dl>")
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n"
    )


def chart(curves: dict[str, Points], highest: float | None = None) -> str:
    """Draw curves of (step, value) over the steps, with a legend. Values from 0 up."""
    curves = {name: [p for p in points if math.isfinite(p[1])] for name, points in curves.items()}
    every = [point for points in curves.values() for point in points]
    if not every:
        return "<p>nothing was logged</p>"
    last = max(step for step, _ in every) or 1
    top = highest or max(value for _, value in every) or 1.0

    def x(step: int) -> float:
        """Place a step, in px."""
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(value: float) -> float:
        """Place a value, in px."""
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top

    parts = []
    for value in ticks(top):
        parts.append(
            f"<line class=grid x1={LEFT} x2={WIDTH - RIGHT} y1={y(value):.1f} y2={y(value):.1f} />"
            f"<text x={LEFT - 6} y={y(value) + 4:.1f} text-anchor=end>{value:g}</text>"
        )
    for step in sorted({math.floor(step) for step in ticks(last)}):
        parts.append(f"<text x={x(step):.1f} y={HEIGHT - 8} text-anchor=middle>{step:,}</text>")
    for colour, (name, points) in zip(_colours(), curves.items(), strict=False):
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        shown = f"fill='{colour}' r=3" if len(points) <= MAX_DOTS else "class=hit r=5"
        dots = "".join(
            f"<circle {shown} cx={x(step):.1f} cy={y(value):.1f}>"
            f"<title>step {step:,}: {html.escape(name)} {value:.4g}</title></circle>"
            for step, value in points
        )
        parts.append(
            f"<polyline points='{path}' fill=none stroke='{colour}' stroke-width=1.5 />"
            f"<g style='color:{colour}'>{dots}</g>"
        )
    legend = "".join(
        f"<span><i style='background:{colour}'></i>{html.escape(name)}</span>"
        for colour, name in zip(_colours(), curves, strict=False)
    )
    box = f"viewBox='0 0 {WIDTH} {HEIGHT}' role=img"
    drawing = f"<div class=wide><svg {box}>{''.join(parts)}</svg></div>"
    return f"{drawing}<p class=legend>{legend}</p>"


def ticks(top: float) -> list[float]:
    """Return round numbers from 0 to `top`, about TICKS of them."""
    size = 10 ** math.floor(math.log10(top / TICKS))
    step = next(size * factor for factor in (1, 2, 5, 10) if top / (size * factor) <= TICKS)
    return [step * number for number in range(math.floor(top / step + 1e-9) + 1)]


def _colours() -> Iterable[str]:
    while True:
        yield from COLOURS


def _watched_table(lines: list[dict[str, Any]]) -> str:
    """A row per sentence, a bar per evaluation: as high as the probability of the answer."""
    evaluated = [line for line in evaluations(lines) if "watch" in line]
    head = "".join(f"<th>{line['step']:,}</th>" for line in evaluated)
    rows = []
    texts = dict.fromkeys(fill["text"] for line in evaluated for fill in line["watch"])
    for colour, text in zip(_colours(), texts, strict=False):
        cells = []
        for line in evaluated:
            fill = next((fill for fill in line["watch"] if fill["text"] == text), None)
            if fill is None:  # watched since a resume only
                cells.append("<td></td>")
                continue
            p = fill.get("answer_p", fill["p"])
            cells.append(
                f"<td class=cell title='step {line['step']:,}: {html.escape(short(fill))}'>"
                f"<div style='height:{2.5 * p:.2f}rem;background:{colour}'></div></td>"
            )
        rows.append(f"<tr><td>{html.escape(text)}</td>{''.join(cells)}</tr>")
    return f"<div class=wide><table><tr><th>step</th>{head}</tr>{''.join(rows)}</table></div>"


def _fills_table(results: dict[str, Any]) -> str:
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
        for cells in before_and_after(results)
    )
    steps = f"<th>step {results['before']['step']:,}</th><th>step {results['after']['step']:,}</th>"
    return f"<div class=wide><table><tr><th></th>{steps}</tr>{rows}</table></div>"
