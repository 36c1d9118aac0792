"""One sentence through the masking and the loss, every value printed.

python -m mlm_scratch.explain "The Milky Way is a spiral galaxy."
python -m mlm_scratch.explain --html galaxy.html "The Milky Way is a spiral galaxy."
"""

import argparse
import os
import sys
from pathlib import Path

from mlm_scratch.config import TUTORIAL, changed
from mlm_scratch.hf.hub import go_offline_without_hub, newest_model
from mlm_scratch.util.errors import OneLineParser, UserError, run_command
from mlm_scratch.util.progress import heavy_imports


def main() -> None:
    """Load a model, trace the sentence through it, and print the trace."""
    given = {name: value for name, value in vars(parse_arguments()).items() if value is not None}
    text, page = given.pop("text"), given.pop("html", None)
    name = given.pop("model") if "model" in given else str(newest_model())
    go_offline_without_hub(name)

    with heavy_imports():  # late: this takes seconds, and the errors above are reported without it
        from transformers.utils import logging

        from mlm_scratch.explain.render import as_html, as_text
        from mlm_scratch.explain.trace import trace
        from mlm_scratch.hf.checks import check_fit, longest_input
        from mlm_scratch.hf.load import load_model, load_tokenizer
        from mlm_scratch.model import MaskedLM

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = changed(TUTORIAL, model=name, **given)
    tokenizer, hf_model = load_tokenizer(name), load_model(name)
    check_fit(tokenizer, hf_model, name)
    config = changed(config, block_size=longest_input(tokenizer, hf_model))
    model = MaskedLM(hf_model)
    result = trace(model, tokenizer, text, config)
    seed = config.optimization.seed
    while not result.predictions and "seed" not in given and seed < TUTORIAL.optimization.seed + 20:
        seed += 1  # 15 % of a short sentence may be no token
        result = trace(model, tokenizer, text, changed(config, seed=seed))
    share = 100 * config.masking.rates[0]
    title = f"seed {seed}, {share:.3g} % of the tokens to be masked"
    if page is None:
        print(title)
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(*as_text(result, tokenizer, colour), sep="\n")
        return
    try:
        Path(page).write_text(as_html(result, tokenizer, text, title), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html: cannot write {page}: {error.strerror}") from error
    print(f"open {page} in a browser")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
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
        help="seed of the masks; default: the first from 42 on that selects a token",
    )
    parser.add_argument("--mlm-probability", type=float, metavar="X", help="share to mask (0.15)")
    parser.add_argument("--whole-word", action="store_true", default=None, help="mask whole words")
    parser.add_argument("--html", metavar="FILE", help="write an HTML page instead")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command(main))
