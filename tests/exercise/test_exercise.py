"""The exercises: right solutions pass, each mistake fails its rule, the command line tells."""

import functools
import subprocess
import sys
from types import SimpleNamespace

import pytest

from mlm_scratch import masking
from mlm_scratch.data import corpus
from mlm_scratch.exercise import __main__ as command
from mlm_scratch.exercise import judge, judging
from mlm_scratch.exercise.judging import CHAPTERS, exercise_of
from mlm_scratch.util.errors import UserError
from tests.exercise.solutions import MISTAKES, SOLUTIONS
from tests.support.processes import ROOT


def solution(chapter, old="", new=""):
    """A solution from its text, with a part of it replaced."""
    text = SOLUTIONS[chapter]
    assert text.count(old) == 1 or not old, old
    names = {}
    exec(compile(text.replace(old, new), f"my_{chapter}.py", "exec"), names)
    return SimpleNamespace(**{name: names[name] for name in exercise_of(chapter).defines})


def verdicts(out):
    """The rules that hold, and those that fail."""
    lines = out.splitlines()
    return tuple([line[6:] for line in lines if line.startswith(word)] for word in ("ok ", "FAIL "))


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_chapter_and_another_way_to_write_it_pass(chapter, capsys):
    exercise = exercise_of(chapter)
    for each, same in ((exercise.chapter, True), (solution(chapter), None)):
        assert judge(chapter, each), capsys.readouterr().out
        out = capsys.readouterr().out
        rules, failed = verdicts(out)
        assert rules == [check.rule for check in exercise.checks] and not failed
        if same:
            assert "also bit for bit the chapter's" in out


def test_a_function_alone_is_judged_where_one_is_enough(capsys):
    assert judge("masking", masking.mask_tokens)
    with pytest.raises(
        UserError, match="has no function epoch_order: pass a module, or a file, with pad"
    ):
        judge("loader", lambda rows, pad_token_id: None)
    with pytest.raises(UserError, match="no exercise 'cake'; there are masking, loader"):
        judge("cake", masking)


@pytest.mark.slow
@pytest.mark.parametrize(
    "chapter, old, new, rule", MISTAKES, ids=[f"{m[0]}-{n}" for n, m in enumerate(MISTAKES)]
)
def test_a_mistake_fails_its_rule(chapter, old, new, rule, capsys):
    assert not judge(chapter, solution(chapter, old, new))
    out = capsys.readouterr().out
    _, failed = verdicts(out)
    assert rule in failed, out
    assert out.count("hint: ") + out.count("Error: ") == 1  # of the first that fails


def test_every_rule_has_a_mistake_that_breaks_it():
    rules = {(chapter, check.rule) for chapter in CHAPTERS for check in exercise_of(chapter).checks}
    assert rules == {(chapter, rule) for chapter, _, _, rule in MISTAKES}
    assert len(MISTAKES) >= 25


def test_a_failure_is_drawn_token_by_token(capsys):
    judge("masking", solution("masking", "selected = selected & ~outside", "pass"))
    out = capsys.readouterr().out
    assert "expected: special tokens as they were, label -100" in out
    (token, sees, label) = (
        line.split() for line in out.splitlines() if line.startswith("        ")
    )
    assert token[0] == "token" and sees[:2] == ["model", "sees"] and label[0] == "label"
    assert 5 < len(token) <= 13 and len(sees) == len(token) + 1 == len(label) + 1


def test_an_error_is_shown_with_the_learners_line(capsys):
    judge("optim", solution("optim", "return step / warmup_steps", "return step / 0"))
    out = capsys.readouterr().out
    assert "my_optim.py, line 2" in out and "ZeroDivisionError: division by zero" in out
    assert "judging.py" not in out


def test_what_cannot_be_used_is_said_to_come_from_the_function(capsys):
    for chapter in CHAPTERS:
        functions = {name: lambda *_, **__: None for name in exercise_of(chapter).defines}
        assert not judge(chapter, SimpleNamespace(**functions))
        assert "Traceback" not in capsys.readouterr().out


def test_a_loop_that_never_ends_is_ended(monkeypatch, capsys):
    monkeypatch.setattr(judging, "LIMIT", 0.2)
    endless = solution("loader", "width = max(map(len, rows))", "while True: pass")
    assert not judge("loader", endless)
    assert "the time for all checks is up" in capsys.readouterr().out


def test_a_slow_solution_is_told_how_slow_it_is(capsys):
    slow = solution(
        "loader", "return np.random", "import time; time.sleep(0.01)\n    return np.random"
    )
    monkeypatched = [check for check in exercise_of("loader").checks if "likely" not in check.rule]
    exercise = exercise_of("loader")
    every, exercise.checks = exercise.checks, monkeypatched
    try:
        assert judge("loader", slow)
    finally:
        exercise.checks = every
    assert " x as long as the chapter's" in capsys.readouterr().out


# ---- The command ---------------------------------------------------------------------------------


def test_the_exercises_are_listed_in_the_order_of_the_chapters(call):
    code, out, _ = call(command)
    assert code == 0
    assert [line.split()[1] for line in out.splitlines() if line[0].isdigit()] == [*CHAPTERS]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_file_to_start_from_is_written_once_and_judged(chapter, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(command, chapter)
    path = tmp_path / f"my_{chapter}.py"
    assert code == 0 and f"python -m mlm_scratch.exercise {chapter} {path.name}" in out
    before = path.read_text()
    code, _, err = call(command, chapter)
    assert code == 2 and "is there already" in err and path.read_text() == before
    code, out, _ = call(command, chapter, path.name)
    assert code == 1 and out.startswith("FAIL") and "NotImplementedError" in out
    path.write_text(SOLUTIONS[chapter])
    assert call(command, chapter, path.name)[0] == 0


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot read my.py: No such file"),
        ("def mask_tokens(:", "my.py, line 1: invalid syntax"),
        ("x = 1\ny = x / 0\n", "my.py, line 2: ZeroDivisionError: division by zero"),
        ("import torch\n", "my.py has no function mask_tokens"),
    ],
)
def test_a_file_that_cannot_be_judged_is_an_error(content, message, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "my.py").write_text(content)
    code, _, err = call(command, "masking", "my.py")
    assert code == 2 and message in err and len(err.splitlines()) == 1
    assert call(command, "masking", "--train")[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize("chapter", CHAPTERS[:-1])  # fills come after training
def test_the_learners_function_is_trained_with_beside_the_chapters(chapter, monkeypatch):
    """A right one gives nearly the same losses; text and steps as few as a test can have."""
    from mlm_scratch.exercise.training import train_beside_the_chapter

    few = corpus.rows(repeats=1)
    monkeypatch.setattr(corpus, "rows", lambda: few)

    monkeypatch.setattr("mlm_scratch.data.documents.MASKINGS", 1)
    lines = [*train_beside_the_chapter(chapter, solution(chapter), steps=10)]
    assert lines[0].split()[-3:] == ["the", "chapter's", "yours"]
    for line in lines[1:-3]:
        chapters, own = map(float, line.split()[-2:])
        assert own == pytest.approx(chapters, abs=0.6)
    assert len(lines) >= 14


@pytest.mark.slow
def test_a_loop_that_catches_everything_ends_too(tmp_path):
    endless = (
        "    while True:\n        try:\n            pass\n        except BaseException: pass\n"
    )
    text = SOLUTIONS["loader"].replace("    width = ", endless + "    width = ")
    (tmp_path / "my.py").write_text(text)
    program = (
        "import sys; from mlm_scratch.exercise import judging, __main__ as m\n"
        "judging.LIMIT = judging.AGAIN = 0.5\n"
        "sys.argv = ['x', 'loader', 'my.py']; sys.exit(m.main())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1 and "time for all checks is up" in result.stdout


@pytest.mark.parametrize("where", ["at the top", "in the function"])
def test_sys_exit_is_no_way_to_pass(where, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = SOLUTIONS["loader"].replace("    width =", "    raise SystemExit(0)\n    width =")
    (tmp_path / "my.py").write_text(text if where == "in the function" else "raise SystemExit(0)")
    code, out, err = call(command, "loader", "my.py")
    assert code == (1 if where == "in the function" else 2) and "SystemExit: 0" in out + err


def test_the_learners_line_is_shown_under_a_decorator_and_for_any_callable(capsys):
    """The start file of exercise 6 has a decorator; functools.partial has no code of its own."""
    judge("fill_mask", solution("fill_mask", "model.eval()", "1 / 0"))
    assert "my_fill_mask.py, line 7" in capsys.readouterr().out
    assert judge("masking", functools.partial(masking.mask_tokens))
    assert not judge("masking", functools.partial(dict, 1))
    assert "TypeError" in capsys.readouterr().out


def test_a_file_may_have_dataclasses_and_import_its_neighbour(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/helper_of_mine.py").write_text("x = 1\n")
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "import helper_of_mine\n@dataclass\nclass A:\n    x: int = 1\n"
    )
    (tmp_path / "sub/my.py").write_text(text + SOLUTIONS["loader"])
    assert call(command, "loader", "sub/my.py")[0] == 0
