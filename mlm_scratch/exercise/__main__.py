"""Write it yourself: an exercise for each chapter, judged by what the chapter teaches.

python -m mlm_scratch.exercise                          lists the exercises
python -m mlm_scratch.exercise masking                  writes my_masking.py to start from
python -m mlm_scratch.exercise masking my_masking.py    judges it
"""

import argparse
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from mlm_scratch.exercise.judging import CHAPTERS, TooSlowError, exercise_of, judge, time_limit
from mlm_scratch.util.errors import OneLineParser, UserError, run_command


def main() -> int:
    """List the exercises, write a file to start from, or judge one: 0 if it is right, else 1."""
    arguments = parse_arguments()
    if arguments.chapter is None:
        print(*overview(), sep="\n")
        return 0
    exercise = exercise_of(arguments.chapter)
    if arguments.file is None:
        path = Path(f"my_{arguments.chapter}.py")
        write_start(path, exercise.start)
        print(f"{path}: {exercise.task}, about {exercise.lines} lines; judge it with")
        print(f"    python -m mlm_scratch.exercise {arguments.chapter} {path}")
        return 0
    try:
        with time_limit(stop_hard=True):
            solution = load(arguments.file)
    except TooSlowError as error:
        raise UserError(f"{arguments.file} does not end when it is read") from error
    passed = judge(arguments.chapter, solution, stop_hard=True)
    if arguments.train:
        from mlm_scratch.exercise.training import train_beside_the_chapter

        print(*train_beside_the_chapter(arguments.chapter, solution), sep="\n")
    return 0 if passed else 1


def overview() -> list[str]:
    """Describe all exercises, in the order of the chapters."""
    lines = []
    for number, chapter in enumerate(CHAPTERS, start=1):
        exercise = exercise_of(chapter)
        lines.append(f"{number}  {chapter:<10} {exercise.task}")
        lines.append(f"   {'':<10} about {exercise.lines} lines; judged {exercise.judged}")
    return [*lines, "begin with: python -m mlm_scratch.exercise masking"]


def write_start(path: Path, text: str) -> None:
    """Write a file to start from. Raises UserError if it exists or cannot be written."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UserError(f"{path} is there already: judge it, or move it away") from error
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def load(path: str) -> ModuleType:
    """Import the learner's file. Raises UserError if that fails; the message names the line."""
    spec = importlib.util.spec_from_file_location(f"learners.{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as an import does
    sys.path.insert(0, str(Path(path).resolve().parent))
    try:
        spec.loader.exec_module(module)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except SyntaxError as error:
        where = f", line {error.lineno}" if error.lineno else ""
        raise UserError(f"{path}{where}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        lines = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == spec.origin]
        where = f", line {lines[-1].lineno}" if lines else ""
        raise UserError(f"{path}{where}: {type(error).__name__}: {error}") from error
    return module


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(
        prog="-m mlm_scratch.exercise",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("chapter", nargs="?", metavar="CHAPTER", help=", ".join(CHAPTERS))
    parser.add_argument("file", nargs="?", metavar="FILE", help="your solution")
    parser.add_argument(
        "--train",
        action="store_true",
        help="then train the small model for 300 steps with your function in the real loop, beside "
        "the chapter's (about a minute)",
    )
    arguments = parser.parse_args()
    if arguments.train and arguments.file is None:
        raise UserError("--train needs a chapter and your file")
    return arguments


if __name__ == "__main__":
    sys.exit(run_command(main))
