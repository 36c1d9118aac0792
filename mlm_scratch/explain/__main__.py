"""One sentence on its way through the masking and the loss, every value printed.

    python -m mlm_scratch.explain "The Milky Way is a spiral galaxy."
    python -m mlm_scratch.explain --html galaxy.html "The Milky Way is a spiral galaxy."

No step of training is written a second time here: the masks come from the loader's Collator, the
logits and the sum of the losses from model.py. What training never needs one by one, the loss and
the probability of each token, is made here of those logits.
"""

import argparse
import html
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from mlm_scratch.config import TUTORIAL, TrainConfig
from mlm_scratch.data.rows import TokenRows, tokenize
from mlm_scratch.hf.checks import sparse_head_works
from mlm_scratch.hf.encode import encode
from mlm_scratch.hf.hub import go_offline_without_hub
from mlm_scratch.hf.load import (
    check_fit,
    in_eval_mode,
    load_model,
    load_tokenizer,
    longest_input,
)
from mlm_scratch.loader import Batch, Collator, Loader, epoch_order
from mlm_scratch.masking import IGNORE
from mlm_scratch.model import MaskedLM, masked_lm_logits, masked_lm_loss
from mlm_scratch.run.directory import newest_model
from mlm_scratch.util.errors import OneLineParser, UserError, run_command

TOP = 3
COLOURS = {"mask": 33, "random": 31, "keep": 36}  # of a terminal: yellow, red, cyan
TOKENS_OF_SHORT_FORM = 12


@dataclass
class Token:
    """What becomes of one token of a row."""

    position: int
    id: int  # in the text
    special: bool
    label: int  # the id to predict, -100 where nothing is asked
    seen: int  # the id that the model sees
    fate: str  # "mask", "random", "keep", or "—" where it was not chosen


@dataclass
class Guess:
    """What the model makes of one masked position."""

    token: Token
    loss: float  # nats
    probability: float  # of the truth
    top: list[tuple[int, float]]  # the most probable ids


@dataclass
class Explanation:
    """A row, the guesses at its masked positions, and what they add up to."""

    tokens: list[Token]
    guesses: list[Guess]
    loss_sum: float  # as masked_lm_loss returns it
    n_masked: int


def row_of(text: str, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> TokenRows:
    """One row, cut at config.block_size."""
    config = replace(config, grouping="lines")
    ((ids, gap_before),) = tokenize([text], tokenizer, config)
    return TokenRows(
        np.array(ids, np.int64),
        starts=np.array([0, len(ids)]),
        gap_before=np.array(gap_before, bool) if config.whole_word else None,
    )


def follow_tokens(
    rows: TokenRows, row: int, batch: Batch, number: int, collator: Collator
) -> list[Token]:
    """What became of each token of rows[row], which is row `number` of `batch`.

    The fate is told from what the model sees: a random token that happens to be the old one looks
    kept, and one that happens to be the mask token looks masked.
    """
    ids = rows.tokens[rows.starts[row] : rows.starts[row + 1]].tolist()
    seen_ids, labels = batch.input_ids[number].tolist(), batch.labels[number].tolist()
    tokens = []
    # Without the padding that may follow.
    for position, (id, seen, label) in enumerate(zip(ids, seen_ids, labels, strict=False)):
        fate = "—"
        if label != IGNORE:
            fate = "keep" if seen == label else "random"
            fate = "mask" if seen == collator.mask_token_id else fate
        tokens.append(Token(position, id, bool(collator.is_special[id]), label, seen, fate))
    return tokens


@torch.no_grad()
def explain(
    net: MaskedLM, tokenizer: PreTrainedTokenizerBase, text: str, config: TrainConfig
) -> Explanation:
    """Mask `text` as the first step of a run on it would, with `config`, and predict; without
    dropout, which would change every number.

    Raises UserError for a text without a token, too long or not UTF-8.
    """
    ids = encode(net.model, tokenizer, [text])["input_ids"][0].tolist()
    if not text.strip() or set(ids) <= set(tokenizer.all_special_ids):
        raise UserError("there is no token to mask in the text: give a sentence")
    rows, collator = row_of(text, tokenizer, config), Collator(tokenizer, config)
    batch = collator(rows, np.arange(1))
    tokens = follow_tokens(rows, 0, batch, 0, collator)
    inputs = (net, batch.input_ids, batch.attention_mask, batch.labels)
    dense = not sparse_head_works(net)
    with in_eval_mode(net):
        logits, labels = masked_lm_logits(*inputs, batch.positions, dense=dense)  # (N, V), (N,)
        loss_sum, n_masked = masked_lm_loss(*inputs, positions=batch.positions, dense=dense)
    if dense:
        logits, labels = logits[batch.positions], labels[batch.positions]  # (N, V), (N,)
    probabilities = logits.float().softmax(dim=1)  # (N, V)
    losses = cross_entropy(logits.float(), labels, reduction="none")  # (N,) nats
    guesses = []
    for number, position in enumerate(batch.positions.tolist()):
        best = probabilities[number].topk(TOP)
        guesses.append(
            Guess(
                tokens[position],
                losses[number].item(),
                probabilities[number, labels[number]].item(),
                list(zip(best.indices.tolist(), best.values.tolist(), strict=True)),
            )
        )
    return Explanation(tokens, guesses, loss_sum.item(), int(n_masked))


# ---- Three ways to show it -----------------------------------------------------------------------

COLUMNS = ("position", "token", "id", "special", "chosen", "fate", "model sees", "label")


def cells(token: Token, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """One row of the table, a text for each of COLUMNS."""
    chosen = token.label != IGNORE
    return (
        str(token.position),
        name_of(token.id, tokenizer),
        str(token.id),
        "yes" if token.special else "",
        "yes" if chosen else "",
        token.fate,
        name_of(token.seen, tokenizer),
        name_of(token.label, tokenizer) if chosen else "",
    )


def name_of(id: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A token as it stands in the vocabulary, where that can be seen."""
    token = tokenizer.convert_ids_to_tokens([id])[0]
    if token is None:  # models often have some more rows than the tokenizer has tokens
        return f"#{id}"
    return token if token.isprintable() and token.strip() else repr(token)


def as_text(
    explanation: Explanation, tokenizer: PreTrainedTokenizerBase, colour: bool
) -> Iterator[str]:
    """The lines for a terminal, or without colour for a pipe."""
    table = [COLUMNS, *(cells(token, tokenizer) for token in explanation.tokens)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        code = COLOURS.get(line[COLUMNS.index("fate")])
        yield f"\033[{code}m{text.rstrip()}\033[0m" if colour and code else text.rstrip()
    yield ""
    for guess in explanation.guesses:
        top = ", ".join(f"{name_of(id, tokenizer)} {p:.4g}" for id, p in guess.top)
        yield (
            f"position {guess.token.position}: p({name_of(guess.token.label, tokenizer)}) = "
            f"{guess.probability:.6g}, loss = -ln p = {guess.loss:.4g}; top {TOP}: {top}"
        )
    yield from sum_of_losses(explanation)


def sum_of_losses(explanation: Explanation) -> Iterator[str]:
    """How the losses of the masked positions make the loss of the step."""
    if not explanation.guesses:
        yield "no token was chosen this time, so there is no loss: try another --seed"
        return
    terms = " + ".join(f"{guess.loss:.4g}" for guess in explanation.guesses)
    total, n = explanation.loss_sum, explanation.n_masked
    yield (
        f"loss of the step: ({terms}) / {n} chosen token{'s' if n > 1 else ''} = "
        f"{total:.4g} / {n} = {total / n:.4g} nats"
    )


def short_form(
    loader: Loader, tokenizer: PreTrainedTokenizerBase, config: TrainConfig
) -> Iterator[str]:
    """The first row of the first step of a run that begins with something to predict: its tokens,
    what the model sees, what it has to predict. With a generator of its own, so that the run does
    not notice."""
    collator = Collator(tokenizer, config)
    order = epoch_order(len(loader.rows), config.seed, epoch=0)[: loader.rows_per_step]
    batch = collator(loader.rows, order)
    asked = (batch.labels[:, :TOKENS_OF_SHORT_FORM] != IGNORE).any(dim=1)  # (B,)
    number = int(asked.int().argmax())  # 0 where there is none
    tokens = follow_tokens(loader.rows, order[number], batch, number, collator)
    lines = [cells(token, tokenizer) for token in tokens[:TOKENS_OF_SHORT_FORM]]
    columns = [COLUMNS.index(name) for name in ("token", "model sees", "label")]
    yield f"row {number} of the first step, {len(lines)} of its {len(tokens)} tokens:"
    for column in columns:
        texts = [
            (line[column] or "·").ljust(max(len(line[other]) for other in columns))
            for line in lines
        ]
        yield f"  {COLUMNS[column]:<10}  {' '.join(texts)}".rstrip()


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


def as_html(
    explanation: Explanation, tokenizer: PreTrainedTokenizerBase, text: str, how_chosen: str
) -> str:
    """The same as a page in one file."""
    escape = html.escape
    head = "".join(f"<th>{column}</th>" for column in COLUMNS)
    lines = "\n".join(
        f'<tr class="{token.fate if token.fate in COLOURS else ""}">'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells(token, tokenizer))
        + "</tr>"
        for token in explanation.tokens
    )
    guesses = "\n".join(
        f"<h2>position {guess.token.position}: "
        f"<code>{escape(name_of(guess.token.label, tokenizer))}</code></h2>"
        f"<p>p = {guess.probability:.6g}, loss = &minus;ln p = {guess.loss:.4g} nats</p><table>"
        + "".join(
            f"<tr><td>{escape(name_of(id, tokenizer))}</td><td><span class=bar style='width:"
            f"{20 * probability:.2f}rem'></span>{probability:.4g}</td></tr>"
            for id, probability in guess.top
        )
        + "</table>"
        for guess in explanation.guesses
    )
    total = "".join(f"<p>{escape(line)}</p>" for line in sum_of_losses(explanation))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(text)}</title>"
        f"<style>{STYLE}</style><h1>{escape(text)}</h1>\n"
        f"<p>{how_chosen}</p><table><tr>{head}</tr>\n{lines}</table>\n{guesses}\n{total}</html>\n"
    )


# ---- The command line ----------------------------------------------------------------------------


def main() -> None:
    """Load what is to be explained with, and print it."""
    parser = OneLineParser(
        prog="-m mlm_scratch.explain",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("text", help="a sentence")
    parser.add_argument("--model", metavar="ID_OR_DIR", help="default: the newest run's model")
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="other masks; default: the first from 42 on that chooses a token",
    )
    parser.add_argument("--mlm-probability", type=float, metavar="X", help="share to mask (0.15)")
    parser.add_argument("--whole-word", action="store_true", default=None, help="mask whole words")
    parser.add_argument("--html", metavar="FILE", help="write a page for a browser instead")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    text, page = given.pop("text"), given.pop("html", None)
    name = given.pop("model") if "model" in given else str(newest_model())
    go_offline_without_hub(name)

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = replace(TUTORIAL, model=name, **given)
    tokenizer, model = load_tokenizer(name), load_model(name)
    check_fit(tokenizer, model, name)
    config = replace(config, block_size=longest_input(tokenizer, model))
    net = MaskedLM(model)
    explanation = explain(net, tokenizer, text, config)
    while not explanation.guesses and "seed" not in given and config.seed < TUTORIAL.seed + 20:
        config = replace(config, seed=config.seed + 1)  # 15 % of a short sentence may be nothing
        explanation = explain(net, tokenizer, text, config)
    share = f"{100 * config.mlm_probability:.3g} %"
    how_chosen = f"seed {config.seed}, {share} of the tokens to be chosen"
    if page is None:
        print(how_chosen)
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(*as_text(explanation, tokenizer, colour), sep="\n")
        return
    try:
        Path(page).write_text(as_html(explanation, tokenizer, text, how_chosen), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html: cannot write {page}: {error.strerror}") from error
    print(f"open {page} in a browser")


if __name__ == "__main__":
    sys.exit(run_command(main))
