"""Fill the masks of a text, first as the pipeline does, then step by step.

python infer.py "The Milky Way is a <mask> galaxy."
python infer.py --top-k 3 --json < texts.txt
python infer.py --joint "The capital of <mask> is <mask>."
python infer.py --score "The Milky Way is a spiral galaxy."
python infer.py --pairs pairs.tsv
python infer.py --generate 12 "The Milky Way"
"""

import argparse
import io
import sys
from itertools import chain
from pathlib import Path

from mlm_scratch.hf.hub import go_offline_without_hub, newest_model
from mlm_scratch.util.errors import OneLineParser, UserError, run_command
from mlm_scratch.util.progress import announced, heavy_imports

TOP_K = 5


def main() -> None:
    """Parse, load, check all texts, then fill or score each and print."""
    arguments = parse_arguments()
    texts = [] if arguments.pairs is not None else arguments.texts or read_texts()
    check_arguments(arguments, texts)
    model_name = newest_model() if arguments.model is None else arguments.model
    go_offline_without_hub(str(model_name))

    with heavy_imports():  # late: this takes seconds, and the errors above are reported without it
        from transformers.utils import logging

        from mlm_scratch.hf.checks import check_fit
        from mlm_scratch.hf.encode import use_own_mask
        from mlm_scratch.hf.load import load_model, load_tokenizer
        from mlm_scratch.inference.generate import generate
        from mlm_scratch.inference.output import Output, harmless
        from mlm_scratch.inference.pairs import judge, lines_of, read_pairs
        from mlm_scratch.inference.score import METHODS
        from mlm_scratch.precision import choose_precision

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    pairs = read_pairs(arguments.pairs) if arguments.pairs is not None else []
    device = choose_precision(arguments.device, "fp32").device
    try:
        tokenizer, model = load_tokenizer(model_name), load_model(model_name, dtype="auto")
    except UserError:
        if arguments.model is not None or Path(model_name).exists():
            raise
        model_name = newest_model()  # the run that wrote it has removed it meanwhile
        tokenizer, model = load_tokenizer(model_name), load_model(model_name, dtype="auto")
    model.eval().to(device)
    check_fit(tokenizer, model, model_name)
    score_method = arguments.score_method or METHODS[0]
    if pairs:
        gains = judge(model, tokenizer, pairs, score_method, arguments.truncate)
        print(*lines_of(gains), sep="\n")
        return
    texts = [use_own_mask(tokenizer, text) for text in texts]
    if arguments.generate:
        n, remask = arguments.generate, arguments.remask
        rounds = (generate(model, tokenizer, text, n, remask) for text in texts or [""])
        for line in chain.from_iterable(rounds):
            print(harmless(line), flush=True)
        return
    output = Output(
        model,
        tokenizer,
        kind=arguments.kind,
        top_k=TOP_K if arguments.top_k is None else arguments.top_k,
        targets=arguments.targets,
        truncate=arguments.truncate,
        score_method=score_method,
        with_steps=bool(arguments.texts),
    )
    output.check(texts)  # all of them, before anything is printed
    output.show(texts)


def check_arguments(arguments: argparse.Namespace, texts: list[str]) -> None:
    """Raise UserError for arguments that do not go together."""
    special = arguments.kind
    for name in ("pairs", "generate"):
        special = special if getattr(arguments, name) is None else name
    if arguments.score_method and special not in ("score", "pairs"):
        raise UserError("--score-method goes with --score or --pairs only")
    if arguments.remask and special != "generate":
        raise UserError("--remask goes with --generate only")
    if arguments.top_k is not None and special not in ("fills", "json", "joint"):
        raise UserError(f"--top-k does not go with --{special}: leave it out")
    if arguments.targets and special not in ("fills", "json"):
        raise UserError(f"--targets does not go with --{special}: leave it out")
    if special == "pairs" and arguments.texts:
        raise UserError("--pairs has its sentences in a file: leave the others out")
    if arguments.generate is not None and arguments.generate < 1:
        raise UserError(f"--generate must be at least 1, got {arguments.generate}")
    if arguments.truncate and special == "generate":
        raise UserError("--truncate does not go with --generate: leave it out")
    if arguments.remask < 0:
        raise UserError(f"--remask must be at least 0, got {arguments.remask}")
    if texts or special in ("pairs", "generate"):
        return
    if arguments.targets:
        raise UserError('no text: put it before --targets, or after them and a "--"')
    raise UserError('no text: python infer.py "The Milky Way is a <mask> galaxy."')


def read_texts() -> list[str]:
    """Read one text per line from standard input, unless that is a terminal.

    Whoever sends nothing for two seconds is told what is waited for.
    """
    if sys.stdin is None or sys.stdin.isatty():
        return []
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")
    with announced("reading texts from standard input, one per line, up to its end"):
        return [line.rstrip("\r\n") for line in sys.stdin if line.strip()]


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(
        prog="infer.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "texts",
        nargs="*",
        metavar="TEXT",
        help="text with one or more masks, written <mask> or [MASK]; none: one per line on "
        "standard input",
    )
    parser.add_argument("--model", metavar="ID_OR_DIR", help="default: the newest run's model")
    parser.add_argument("--top-k", type=int, metavar="N", help="fills per mask (5)")
    parser.add_argument(
        "--targets",
        nargs="+",
        metavar="TOKEN",
        help="consider only these tokens of the vocabulary; after a space, a word is looked up "
        "with that space, except with --json, which does what the pipeline does",
    )
    parser.add_argument(
        "--truncate", action="store_true", help="cut texts that are too long for the model"
    )
    parser.set_defaults(kind="fills")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--joint",
        dest="kind",
        action="store_const",
        const="joint",
        help="fill several masks together, by beam search: words that fit together",
    )
    kind.add_argument(
        "--score",
        dest="kind",
        action="store_const",
        const="score",
        help="print how probable each token of a text without masks is, given all the others",
    )
    kind.add_argument(
        "--pairs",
        metavar="FILE",
        help="of each pair of sentences in a file (tabs or .jsonl: good, bad, and perhaps a "
        "phenomenon; or one of BLiMP's), tell whether the good one scores higher",
    )
    kind.add_argument(
        "--generate",
        type=int,
        metavar="N",
        help="append N masks to a text and fill them over a few rounds, the most certain first",
    )
    kind.add_argument(
        "--json",
        dest="kind",
        action="store_const",
        const="json",
        help='print what pipeline("fill-mask") returns, nothing else',
    )
    parser.add_argument(
        "--score-method",
        choices=("word-l2r", "original"),
        help="--score and --pairs: mask a token alone (original), or with it the later tokens of "
        "its word, which would give it away (word-l2r, the default)",
    )
    parser.add_argument(
        "--remask",
        type=int,
        default=0,
        metavar="N",
        help="--generate: mask and fill the less certain half again, N times (0)",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command(main))
