"""What README says of the code stands in the code."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_map_of_arguments_names_lines_and_tests_that_exist():
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py"))
    section = README.split("## From the reference's arguments")[1].split("\n## ")[0]
    rows = re.findall(
        r"^\| (.+?) \| `([\w/]+\.py)` \| `(.+?)`.*? \| `(test_\w+)` \|$", section, re.M
    )
    assert len(rows) == section.count("\n| ") - 1  # every row but the head was understood
    for argument, file, line, test in rows:
        assert line in (ROOT / "mlm_scratch" / file).read_text(encoding="utf-8"), (argument, line)
        assert f"def {test}(" in tests, (argument, test)


def test_every_module_is_named_in_the_reading_guide():
    modules = {path.name for path in (ROOT / "mlm_scratch").rglob("*.py")}
    guide = README.split("## How to read the code")[1].split("\n## ")[0]
    assert {name for name in modules if name not in guide} - {
        "__init__.py",
        "facts.py",
        "generate.py",
    } == set()


def test_the_reading_path_is_as_long_as_the_guide_says():
    rows = re.findall(r"^\| \d \| `(\w+\.py)` \| (\d+) \|", README, re.M)
    assert len(rows) == 5
    for file, lines in rows:
        text = (ROOT / "mlm_scratch" / file).read_text(encoding="utf-8")
        assert len(text.splitlines()) == int(lines), file
