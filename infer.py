"""Fill the masks of a text, first as the pipeline does it, then step by step.

    python infer.py "The Milky Way is a <mask> galaxy."
    python infer.py --top-k 3 --json < texts.txt
    python infer.py --joint "The capital of <mask> is <mask>."
    python infer.py --score "The Milky Way is a spiral galaxy."
"""

import argparse
import io
import json
import math
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mlm_scratch.errors import OneLineParser, UserError, run_command
from mlm_scratch.hub import go_offline_without_hub
from mlm_scratch.run_dir import newest_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BAR_WIDTH = 20
BATCH = 8  # texts at once


def main() -> None:
    """Parse, load, check, then for each text fill or score, and print."""
    arguments = parse_arguments()
    texts = arguments.texts or read_texts()
    if arguments.targets and arguments.show is not show_fills:
        raise UserError("--targets goes with neither --joint nor --score: leave it out")
    if not texts and arguments.targets:
        raise UserError('no text: it has to come before --targets, or after them and a "--"')
    if not texts:
        raise UserError('no text: python infer.py "The Milky Way is a <mask> galaxy."')
    model_name = newest_model() if arguments.model is None else arguments.model
    go_offline_without_hub(str(model_name))

    # Only now: these imports take seconds, and what was wrong so far is told at once.
    from transformers.utils import logging

    from mlm_scratch.fill_mask import fill_mask
    from mlm_scratch.inputs import use_own_mask
    from mlm_scratch.load import check_fit, load_model, load_tokenizer
    from mlm_scratch.precision import choose_precision

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = choose_precision(arguments.device, "fp32").device
    tokenizer = load_tokenizer(model_name)
    model = load_model(model_name, dtype="auto").eval().to(device)
    check_fit(tokenizer, model, model_name)
    texts = [use_own_mask(tokenizer, text) for text in texts]
    check_texts(model, tokenizer, texts, arguments)
    if arguments.json:
        fills = fill_mask(
            model, tokenizer, texts, top_k=arguments.top_k, targets=arguments.targets,
            truncate=arguments.truncate,
        )
        can_show_all = (sys.stdout.encoding or "").lower().startswith("utf")
        print(json.dumps(fills, ensure_ascii=not can_show_all, indent=2))
    else:
        show_all(model, tokenizer, texts, arguments)


def check_texts(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: list[str],
    arguments: argparse.Namespace,
) -> None:
    """Raise UserError for the first text that cannot be filled or scored, before work begins."""
    from mlm_scratch.inputs import encode, find_masks, find_words

    check = find_words if arguments.show is show_score else find_masks
    for number, text in enumerate(texts, start=1):
        try:
            (input_ids,) = encode(model, tokenizer, [text], arguments.truncate)["input_ids"]  # (T,)
            check(tokenizer, input_ids, text)
        except UserError as error:
            raise UserError(f"text {number}: {error}" if len(texts) > 1 else str(error)) from error


def show_all(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: list[str],
    arguments: argparse.Namespace,
) -> None:
    """Print what is asked of each text, BATCH of them at a time, with a bar if they are many."""
    from mlm_scratch.probe import ignores_padding
    from mlm_scratch.progress import progress_bar

    # Targets may be spelled otherwise in each text; joint fills and scores are batches themselves.
    one_by_one = arguments.targets or arguments.show is not show_fills
    size = 1 if one_by_one or not ignores_padding(model, tokenizer) else BATCH
    at_once = len(texts) <= size
    with progress_bar(total=len(texts), unit=" texts", leave=False, disable=at_once) as bar:
        for start in range(0, len(texts), size):
            batch = texts[start : start + size]
            lines = list(arguments.show(model, tokenizer, batch, arguments))
            with bar.external_write_mode():
                print(*lines, sep="\n")
            bar.update(len(batch))


def read_texts() -> list[str]:
    """One text per line of standard input; none where that is a terminal."""
    if sys.stdin is None or sys.stdin.isatty():
        return []
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")
    return [line.rstrip("\r\n") for line in sys.stdin if line.strip()]


def show_fills(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: list[str],
    arguments: argparse.Namespace,
) -> Iterator[str]:
    """The fills of each text; of one named on the command line also the way to them, unless that is
    cut short by targets."""
    from mlm_scratch.fill_mask import fill_mask, walk_through

    if arguments.targets:
        fills = [fill_with_targets(model, tokenizer, text, arguments) for text in texts]
    else:
        fills = fill_mask(
            model, tokenizer, texts, top_k=arguments.top_k, truncate=arguments.truncate,
            batch_size=len(texts),
        )
        fills = fills if len(texts) > 1 else [fills]
    for text, text_fills in zip(texts, fills, strict=True):
        yield text
        several = isinstance(text_fills[0], list)
        for number, mask_fills in enumerate(text_fills if several else [text_fills], start=1):
            if several:
                yield f"  mask {number}"
            yield from (f"  {line_of(fill)}" for fill in mask_fills)
        if arguments.texts and not arguments.targets:
            yield "\nstep by step"
            for line in walk_through(
                model, tokenizer, text, arguments.top_k, arguments.truncate
            ):
                yield f"  {line}"
        yield ""


def fill_with_targets(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    text: str,
    arguments: argparse.Namespace,
) -> list:
    """What fill_mask returns, with the targets spelled for each mask as the text before it asks."""
    from mlm_scratch.fill_mask import fill_mask
    from mlm_scratch.inputs import encode, find_masks, spell_target

    (input_ids,) = encode(model, tokenizer, [text], arguments.truncate)["input_ids"]  # (T,)
    n_masks = len(find_masks(tokenizer, input_ids, text))  # that --truncate leaves
    masks = list(re.finditer(re.escape(tokenizer.mask_token), text))[:n_masks]
    spelled = [
        tuple(
            spell_target(tokenizer, target, before=text[: mask.start()])
            for target in arguments.targets
        )
        for mask in masks
    ]  # the targets of each mask
    fills = {
        targets: fill_mask(
            model, tokenizer, text, top_k=arguments.top_k, targets=list(targets),
            truncate=arguments.truncate,
        )
        for targets in dict.fromkeys(spelled)
    }
    if len(fills) == 1:
        return fills[spelled[0]]
    return [fills[targets][number] for number, targets in enumerate(spelled)]


def show_joint(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: list[str],
    arguments: argparse.Namespace,
) -> Iterator[str]:
    """All masks of each text filled together, in both orders."""
    from mlm_scratch.joint import ORDERS, fill_jointly

    for text in texts:
        yield text
        for order in ORDERS if text.count(tokenizer.mask_token) > 1 else ORDERS[:1]:
            yield f"  {order}"
            fills = fill_jointly(
                model, tokenizer, text, order, top_k=arguments.top_k, truncate=arguments.truncate
            )
            for fill in fills:
                words = " ".join(repr(tokenizer.decode([token])) for token in fill.tokens)
                yield f"  {fill.score:<9.4g} {words}  {fill.sequence}"
        yield ""


def show_score(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: list[str],
    arguments: argparse.Namespace,
) -> Iterator[str]:
    """Pseudo-log-likelihood and pseudo-perplexity of each text, and what each token gives."""
    from mlm_scratch.joint import score_sentence

    for text in texts:
        scores = score_sentence(model, tokenizer, text, arguments.truncate)
        total = sum(score for _, score in scores)
        yield text
        for token, score in scores:
            yield f"  {score:9.4f}  p {math.exp(score):<9.4g}  {tokenizer.decode([token])!r}"
        yield (
            f"  {total:9.4f}  pseudo-log-likelihood of {len(scores)} tokens, pseudo-perplexity "
            f"{math.exp(min(-total / len(scores), 700)):.4g}\n"
        )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = OneLineParser(
        prog="infer.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "texts", nargs="*", metavar="TEXT",
        help="text with one or more masks, written <mask> or [MASK]; none: one per line on "
        "standard input",
    )
    parser.add_argument("--model", metavar="ID_OR_DIR", help="default: the newest run's model")
    parser.add_argument("--top-k", type=int, default=5, metavar="N", help="fills per mask (5)")
    parser.add_argument(
        "--targets", nargs="+", metavar="TOKEN",
        help="consider only these tokens of the vocabulary; a word after a space is taken with it, "
        "except with --json, which does as the pipeline",
    )
    parser.add_argument(
        "--truncate", action="store_true", help="cut texts that are too long for the model"
    )
    parser.set_defaults(show=show_fills)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--joint", dest="show", action="store_const", const=show_joint,
        help="fill several masks together, by beam search: words that go with each other",
    )
    what.add_argument(
        "--score", dest="show", action="store_const", const=show_score,
        help="how probable each token of a text without masks is, given all the others",
    )
    what.add_argument(
        "--json", action="store_true", help='print what pipeline("fill-mask") returns, nothing else'
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    return parser.parse_args()


def line_of(fill: dict) -> str:
    """One fill on one line: score, bar, token, sentence."""
    bar = "█" * round(fill["score"] * BAR_WIDTH)
    return f"{fill['score']:<9.4g} {bar:<{BAR_WIDTH}} {fill['token_str']!r:<14} {fill['sequence']}"


if __name__ == "__main__":
    sys.exit(run_command(main))
