"""Fill the masks of a text, first as the pipeline does it, then step by step.

    python infer.py "The Milky Way is a <mask> galaxy."
    python infer.py --top-k 3 --json < texts.txt
"""

import argparse
import io
import json
import sys

from mlm_scratch.errors import OneLineParser, UserError, run_command
from mlm_scratch.hub import go_offline_without_hub
from mlm_scratch.run_dir import newest_model

BAR_WIDTH = 20


def main() -> None:
    """Parse, load, fill, print."""
    arguments = parse_arguments()
    texts = arguments.texts
    if not texts and sys.stdin is not None and not sys.stdin.isatty():
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")
        texts = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise UserError('no text: python infer.py "The Milky Way is a <mask> galaxy."')
    model_name = arguments.model or newest_model()
    go_offline_without_hub(str(model_name))

    # Only now: these imports take seconds, and what was wrong so far is told at once.
    from transformers.utils import logging

    from mlm_scratch import fill_mask
    from mlm_scratch.load import check_fit, load_model, load_tokenizer
    from mlm_scratch.precision import choose_precision

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = choose_precision(arguments.device, "fp32").device
    tokenizer, model = load_tokenizer(model_name), load_model(model_name).eval().to(device)
    check_fit(tokenizer, model, model_name)
    texts = [fill_mask.use_own_mask(tokenizer, text) for text in texts]
    options = {"top_k": arguments.top_k, "targets": arguments.targets}
    fills = fill_mask.fill_mask(model, tokenizer, texts, **options)

    if arguments.json:
        print(json.dumps(fills, ensure_ascii=False, indent=2))
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without the bar's █ shows a ?
    for text, text_fills in zip(texts, fills if len(texts) > 1 else [fills], strict=True):
        print(text)
        several = isinstance(text_fills[0], list)
        for number, mask_fills in enumerate(text_fills if several else [text_fills], start=1):
            if several:
                print(f"  mask {number}")
            for fill in mask_fills:
                print("  " + show(fill))
        print("\nstep by step")
        for line in fill_mask.walk_through(model, tokenizer, text, arguments.top_k):
            print("  " + line)
        print()


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
        "--targets", nargs="+", metavar="TOKEN", help="consider only these tokens of the vocabulary"
    )
    parser.add_argument(
        "--json", action="store_true", help='print what pipeline("fill-mask") returns, nothing else'
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    return parser.parse_args()


def show(fill: dict) -> str:
    """One fill on one line: score, bar, token, sentence."""
    bar = "█" * round(fill["score"] * BAR_WIDTH)
    return f"{fill['score']:<9.4g} {bar:<{BAR_WIDTH}} {fill['token_str']!r:<14} {fill['sequence']}"


if __name__ == "__main__":
    sys.exit(run_command(main))
