"""What the README files and the guide to adapting say about the code is true of the code."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mlm_scratch"
FRONT, GUIDE, TESTS = (
    (ROOT / folder / "README.md").read_text(encoding="utf-8")
    for folder in ("", "mlm_scratch", "tests")
)
ADAPTING = (PACKAGE / "ADAPTING.md").read_text(encoding="utf-8")
CHAPTERS = ["masking.py", "loader.py", "model.py", "optim.py", "loop.py", "fill_mask.py"]


def section(readme, title):
    """The text from this heading to the next of its level."""
    return readme.split(f"## {title}")[1].split("\n## ")[0]


def test_the_map_of_arguments_quotes_lines_and_names_tests_that_exist():
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py"))
    table = section(GUIDE, "From Hugging Face's arguments to the lines here")
    rows = re.findall(r"^\| (.+?) \| `([\w/]+\.py)` \| `(.+?)`.*? \| `(test_\w+)` \|$", table, re.M)
    assert len(rows) == table.count("\n| ") - 1 > 30  # every row but the head was understood
    for argument, file, line, test in rows:
        assert line in (PACKAGE / file).read_text(encoding="utf-8"), (argument, line)
        assert f"def {test}(" in tests, (argument, test)


def test_every_module_is_named_in_the_guide():
    modules = {path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    named = set(re.findall(r"`(\w+\.py)`", GUIDE))
    assert {path.name for path in modules} - named == set()


@pytest.mark.parametrize("readme", [FRONT, GUIDE], ids=["front page", "guide"])
def test_the_chapters_are_as_long_as_their_tables_say(readme):
    rows = re.findall(r"`(\w+\.py)` \| (\d+) \|", readme)
    assert [file for file, _ in rows] == CHAPTERS
    for file, lines in rows:
        assert len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) == int(lines), file


def test_every_path_and_link_exists():
    """Paths in backticks, and what the links lead to, as seen from where each file lies."""
    for folder, readme in (
        (ROOT, FRONT),
        (PACKAGE, GUIDE),
        (PACKAGE, ADAPTING),
        (ROOT / "tests", TESTS),
    ):
        for path in re.findall(r"\]\((?!http)([^)]+)\)", readme):
            assert (folder / path).exists(), path
        for path in re.findall(r"`(tests/[\w/]+\.py)`", readme):
            assert (ROOT / path).exists(), path
        for path in re.findall(r"`([a-z_]+/[\w/]+\.py)`", readme):
            assert any((base / path).exists() for base in (ROOT, PACKAGE, folder)), path


def test_every_flag_in_the_readmes_is_one():
    """Of train.py, infer.py, explain, or the programs in tests/tools."""
    sources = [*ROOT.glob("*.py"), *PACKAGE.glob("*/__main__.py"), *ROOT.glob("tests/tools/*.py")]
    known = set(re.findall(r'"(--[\w-]+)"', "".join(path.read_text() for path in sources)))
    fields = re.findall(r"^    (\w+): .*= _option\(", (PACKAGE / "config.py").read_text(), re.M)
    known |= {"--" + name.replace("_", "-") for name in fields}
    of_others = {"--nproc-per-node", "--max-restarts", "--nnodes", "--logdir", "--help"}
    of_others |= {"--requeue", "--signal"}
    used = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", FRONT + GUIDE + ADAPTING + TESTS))
    assert used - known - of_others == set()


def test_the_front_page_is_short():
    assert len(FRONT.split()) <= 1800
