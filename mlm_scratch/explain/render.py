"""A trace as text for a terminal, or as an HTML page."""

import html
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from mlm_scratch.explain.trace import TOP_K, Token, Trace
from mlm_scratch.hf.encode import visible_token
from mlm_scratch.masking import IGNORE
from mlm_scratch.util.tables import aligned

COLUMNS = ("position", "token", "id", "special", "selected", "treatment", "model sees", "label")
COLOURS = {"mask": 33, "random": 31, "keep": 36}  # ANSI: yellow, red, cyan

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
h1 { font-size: 1.3rem } h2 { font-size: 1.1rem; margin: 1.2rem 0 0 } p { margin: .2rem 0 }
code, td { font-family: ui-monospace, monospace; font-size: .9rem }
table { border-collapse: collapse } th, td { text-align: left; padding: .2rem .8rem .2rem 0 }
th { border-bottom: 2px solid #ccc } tr.mask td { background: #fff1b8 }
tr.random td { background: #ffd8d2 } tr.keep td { background: #d3f0f7 }
.bar { display: inline-block; height: .8rem; background: #4a78c4; margin-right: .5rem }
"""


def cells(token: Token, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return one row of the table, one string per column in COLUMNS."""
    selected = token.label != IGNORE
    return (
        str(token.position),
        visible_token(token.id, tokenizer),
        str(token.id),
        "yes" if token.special else "",
        "yes" if selected else "",
        token.treatment,
        visible_token(token.seen, tokenizer),
        visible_token(token.label, tokenizer) if selected else "",
    )


def as_text(trace: Trace, tokenizer: PreTrainedTokenizerBase, colour: bool) -> Iterator[str]:
    """Yield the lines for a terminal, or without colour for a pipe."""
    table = [COLUMNS, *(cells(token, tokenizer) for token in trace.tokens)]
    for row, line in zip(table, aligned(table), strict=True):
        code = COLOURS.get(row[COLUMNS.index("treatment")])
        yield f"\033[{code}m{line}\033[0m" if colour and code else line
    yield ""
    for prediction in trace.predictions:
        top = ", ".join(f"{visible_token(id, tokenizer)} {p:.4g}" for id, p in prediction.top)
        label = visible_token(prediction.token.label, tokenizer)
        yield (
            f"position {prediction.token.position}: p({label}) = {prediction.probability:.6g}, "
            f"loss = -ln p = {prediction.loss:.4g}; top {TOP_K}: {top}"
        )
    yield from loss_lines(trace)


def loss_lines(trace: Trace) -> Iterator[str]:
    """Yield lines that compute the loss of the step from the losses of the masked tokens."""
    if not trace.predictions:
        yield "no token was selected this time, so there is no loss: try another --seed"
        return
    terms = " + ".join(f"{prediction.loss:.4g}" for prediction in trace.predictions)
    total, n = trace.loss_sum, len(trace.predictions)
    yield (
        f"loss of the step: ({terms}) / {n} masked token{'s' if n > 1 else ''} = "
        f"{total:.4g} / {n} = {total / n:.4g} nats"
    )


def as_html(trace: Trace, tokenizer: PreTrainedTokenizerBase, text: str, subtitle: str) -> str:
    """Return the trace as a self-contained HTML page."""
    escape = html.escape
    head = "".join(f"<th>{column}</th>" for column in COLUMNS)
    lines = "\n".join(
        f'<tr class="{token.treatment if token.treatment in COLOURS else ""}">'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells(token, tokenizer))
        + "</tr>"
        for token in trace.tokens
    )
    predictions = "\n".join(
        f"<h2>position {prediction.token.position}: "
        f"<code>{escape(visible_token(prediction.token.label, tokenizer))}</code></h2>"
        f"<p>p = {prediction.probability:.6g}, loss = &minus;ln p = {prediction.loss:.4g} nats</p>"
        "<table>"
        + "".join(
            f"<tr><td>{escape(visible_token(id, tokenizer))}</td><td><span class=bar style='width:"
            f"{20 * probability:.2f}rem'></span>{probability:.4g}</td></tr>"
            for id, probability in prediction.top
        )
        + "</table>"
        for prediction in trace.predictions
    )
    total = "".join(f"<p>{escape(line)}</p>" for line in loss_lines(trace))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(text)}</title>"
        f"<style>{STYLE}</style><h1>{escape(text)}</h1>\n"
        f"<p>{subtitle}</p><table><tr>{head}</tr>\n{lines}</table>\n{predictions}\n{total}</html>\n"
    )
