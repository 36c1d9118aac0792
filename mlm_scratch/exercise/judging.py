"""Judging: a list of small checks, each one a rule that a chapter teaches."""

import importlib
import inspect
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType, SimpleNamespace
from typing import Any

from mlm_scratch.util.errors import UserError
from mlm_scratch.util.tables import aligned

CHAPTERS = ("masking", "loader", "model", "optim", "loop", "fill_mask")
LIMIT, AGAIN = 180.0, 5.0  # seconds for all checks, and between attempts to end an endless loop
TIME_IS_UP = "the time for all checks is up: does a loop never end?"
SLOW = 10  # times the chapter's time
# A right solution fails a statistical check with a probability of 10^-10: two-sided, if normal.
SIGMAS = 6.5


class Wrong(Exception):
    """A rule that does not hold."""

    def __init__(self, expected: str, came: str, drawing: Iterable[str] = ()):
        super().__init__(expected, came)
        self.expected, self.came, self.drawing = expected, came, list(drawing)


class TooSlowError(BaseException):
    """The time is up. Not an Exception: the learner's code may catch those."""


@dataclass(frozen=True)
class Check:
    """One rule.

    Attributes:
        rule: what has to hold, in a line.
        hint: the idea behind it, not the code.
        holds: called with the solution; raises Wrong if it does not.
    """

    rule: str
    hint: str
    holds: Callable[[Any], None]


@dataclass
class Exercise:
    """What to write in place of a chapter, or of a part of it.

    Attributes:
        task: what to write, in a line.
        lines: about how many it takes.
        judged: how, in a line.
        defines: the functions that a solution has.
        start: the file to start from.
        twin: a solution -> whether it equals the chapter bit for bit, which is not asked for.
        timed: a solution -> calls it once, as a run would.
        chapter: the chapter's own functions, as a solution.
        checks: in the order in which they are judged.
    """

    task: str
    lines: int
    judged: str
    defines: tuple[str, ...]
    start: str
    twin: Callable[[Any], bool]
    timed: Callable[[Any], object]
    chapter: Any
    checks: list[Check] = field(default_factory=list)

    def check(self, rule: str, hint: str) -> Callable[[Callable[[Any], None]], Any]:
        """Add the decorated function as the next check."""

        def add(holds: Callable[[Any], None]) -> Callable[[Any], None]:
            """Add it."""
            self.checks.append(Check(rule, hint, holds))
            return holds

        return add


def exercise_of(chapter: str) -> Exercise:
    """Return the exercise of a chapter. Raises UserError if there is none."""
    if chapter not in CHAPTERS:
        raise UserError(f"no exercise {chapter!r}; there are {', '.join(CHAPTERS)}")
    return importlib.import_module(f"mlm_scratch.exercise.{chapter}").EXERCISE


def judge(chapter: str, solution: Any, *, stop_hard: bool = False) -> bool:
    """Judge a solution: print a line per check, and the details of the first that fails.

    Args:
        chapter: masking, loader, model, optim, loop or fill_mask.
        solution: the function that the exercise asks for, or a module that has it.
        stop_hard: end the whole process if an endless loop cannot be interrupted.

    Returns:
        whether every check passed.

    Raises:
        UserError: there is no such exercise, or the solution lacks a function.
    """
    exercise = exercise_of(chapter)
    solution = _with_functions(exercise, solution)
    passed = True
    with time_limit(stop_hard):
        for check in exercise.checks:
            problem = _problem(check, exercise, solution)
            if problem is None:
                print(f"ok    {check.rule}")
                continue
            print(f"FAIL  {check.rule}")
            if passed:
                print(*(f"      {line}" for line in problem), sep="\n")
            passed = False
            if problem[0] == TIME_IS_UP:
                return False
        if passed:
            print(*_beside_the_chapter(exercise, solution), sep="\n")
    return passed


def _with_functions(exercise: Exercise, solution: Any) -> Any:
    if callable(solution) and not hasattr(solution, exercise.defines[0]):
        solution = SimpleNamespace(**{exercise.defines[0]: solution})
    for name in exercise.defines:
        if not callable(getattr(solution, name, None)):
            where = getattr(solution, "__file__", "the solution")
            needed = " and ".join(exercise.defines)
            raise UserError(
                f"{where} has no function {name}: pass a module, or a file, with {needed}"
            )
    return solution


def _problem(check: Check, exercise: Exercise, solution: Any) -> list[str] | None:
    """Run a check; describe what is wrong in lines, or return None."""
    try:
        check.holds(solution)
    except Wrong as wrong:
        came = [f"expected: {wrong.expected}", f"came:     {wrong.came}", *wrong.drawing]
        return [*came, f"hint: {check.hint}"]
    except TooSlowError as error:
        return [TIME_IS_UP, *_lines_of(error, _files_of(exercise, solution))]
    except (Exception, SystemExit) as error:
        lines = _lines_of(error, _files_of(exercise, solution))
        return [*lines, f"{type(error).__name__}: {error}"]
    return None


def _files_of(exercise: Exercise, solution: Any) -> set[str]:
    """Return the files that the learner's functions are written in."""
    functions = [inspect.unwrap(getattr(solution, name)) for name in exercise.defines]
    codes = [getattr(function, "__code__", None) for function in functions]
    files = {code.co_filename for code in codes if code is not None}
    return files | {getattr(solution, "__file__", None) or "<none>"}


def _lines_of(error: BaseException, own: set[str]) -> Iterator[str]:
    """Yield the innermost line that an error came from in the learner's own files."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in own]
    if frames:
        yield f"{frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line}"
    else:
        yield "the function cannot be called so, or what it returned cannot be used:"


@contextmanager
def time_limit(stop_hard: bool) -> Iterator[None]:
    """Raise TooSlowError in this thread once the time is up; again, if that is caught."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield  # a system, or a thread, that has no alarm
        return
    rings = 0

    def ring(number: int, frame: FrameType | None) -> None:
        """End what runs."""
        nonlocal rings
        rings += 1
        if stop_hard and rings == 3:
            print("      the time is up, and the loop cannot be interrupted", flush=True)
            os._exit(1)
        raise TooSlowError

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, LIMIT, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _beside_the_chapter(exercise: Exercise, solution: Any) -> Iterator[str]:
    """Compare a right solution with the chapter: is it the same to the bit, and how fast?"""
    same = exercise.twin(solution)
    yield f"all right; {'also' if same else 'not'} bit for bit the chapter's (not asked for)"
    own, chapter = (seconds(exercise.timed, each) for each in (solution, exercise.chapter))
    ratio = own / chapter
    pace = f"{ratio:.0f} x as long as" if ratio > SLOW else "about as long as"
    yield f"a call takes {1000 * own:.2g} ms, {pace} the chapter's, {1000 * chapter:.2g} ms"


def seconds(call: Callable[[Any], object], solution: Any, repeats: int = 5) -> float:
    """Return the time of the fastest of some calls."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call(solution)
        times.append(time.perf_counter() - begun)
        if sum(times) > 2:
            break
    return min(times)


# ---- What checks use -----------------------------------------------------------------------------


def share_is(what: str, n_true: int, n: int, expected: float) -> None:
    """Raise Wrong unless a share of n independent draws is the expected one, within chance."""
    off = SIGMAS * (expected * (1 - expected) / n) ** 0.5
    if not abs(n_true / n - expected) <= off:
        raise Wrong(
            f"{what}: {expected:.4g}, give or take {off:.1g} by chance in {n:,}",
            f"{n_true / n:.4f}",
        )


def equal(what: str, came: Any, expected: Any, drawing: Iterable[str] = ()) -> None:
    """Raise Wrong unless two values are equal."""
    if came != expected:
        raise Wrong(f"{what} = {expected}", f"{came}", drawing)


def close(what: str, came: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Raise Wrong unless two numbers agree within rounding."""
    came, expected = float(came), float(expected)
    if not abs(came - expected) <= tolerance * max(1.0, abs(expected)):
        raise Wrong(f"{what} = {expected:.7g}", f"{came:.7g}")


def drawn(columns: Mapping[str, Sequence[Any]], limit: int = 12) -> list[str]:
    """Draw tokens side by side: a line per name, at most `limit` of them."""
    rows = [[f"{name} ", *map(str, cells[:limit])] for name, cells in columns.items()]
    return [f"  {line}" for line in aligned(rows, gap=" ")]
