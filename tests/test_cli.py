"""train.py and infer.py, as a user calls them."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, FillMaskPipeline, pipeline

import infer
import train
from tests.support.processes import ROOT
from tests.support.tiny import small_flags

MILKY_WAY = "The Milky Way is a <mask> galaxy."


def test_train_then_fill(files, call):
    code, out, _ = call(train, *small_flags(files), "--epochs", 2)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("recipe tutorial: ")
    assert lines[-1].strip() == f'python infer.py "{MILKY_WAY}"'  # the command works as printed:
    code, out, _ = call(infer, MILKY_WAY)
    assert code == 0
    assert "step by step" in out
    tokenizer = AutoTokenizer.from_pretrained("runs/latest/model")
    assert str(tokenizer(MILKY_WAY)["input_ids"]) in out
    assert out.count("The Milky Way is a") > 10  # the text, 5 fills, 5 step by step
    code, _, err = call(infer, "--model", "runs/latest", MILKY_WAY)
    assert code == 2 and "pass runs/latest/model or one of its checkpoints" in err


@pytest.mark.parametrize(
    "arguments, texts, options",
    [
        ([MILKY_WAY], MILKY_WAY, {}),
        (
            ["The [MASK] Way is a <mask> galaxy.", "--top-k", 2],
            "The <mask> Way is a <mask> galaxy.",
            {"top_k": 2},
        ),
        (
            [MILKY_WAY, "Rome <mask>", "--targets", "is", " the"],
            [MILKY_WAY, "Rome <mask>"],
            {"targets": ["is", " the"]},
        ),
    ],
    ids=["one", "two masks", "two texts"],
)
def test_json_is_what_the_pipeline_returns(files, call, arguments, texts, options):
    code, out, _ = call(infer, "--model", files / "model", "--json", *arguments)
    assert code == 0
    fill_masks = FillMaskPipeline(
        model=AutoModelForMaskedLM.from_pretrained(files / "model"),
        tokenizer=AutoTokenizer.from_pretrained(files / "model"),
    )
    assert json.loads(out) == fill_masks(texts, **options)


def test_fills_of_half_precision_weights_equal_the_pipelines(files, call):
    model = AutoModelForMaskedLM.from_pretrained(files / "model", dtype=torch.float16)
    model.save_pretrained("half")
    AutoTokenizer.from_pretrained(files / "model").save_pretrained("half")
    _, out, _ = call(infer, "--model", "half", "--json", MILKY_WAY, "--device", "cpu")
    assert json.loads(out) == pipeline("fill-mask", model="half", device="cpu")(MILKY_WAY)


def test_texts_from_standard_input(files, call):
    as_arguments = call(infer, "--model", files / "model", "--json", MILKY_WAY, "<mask>")
    as_lines = call(infer, "--model", files / "model", "--json", stdin=f"{MILKY_WAY}\n\n<mask>\n")
    assert as_lines == as_arguments


def test_resume_takes_the_settings_of_the_run(files, call):
    call(train, *small_flags(files), "--max-steps", 4, "--save-every", 2, "--seed", 5)
    code, out, _ = call(train, "--resume", "--max-steps", 8)
    assert code == 0 and "steps 4 to 8" in out
    saved = json.loads(Path("runs/latest/run.json").read_text())["config"]
    assert saved["optimization"]["seed"] == 5 and saved["optimization"]["max_steps"] == 8
    code, out, _ = call(
        train, *small_flags(files), "--resume", "--max-steps", 9
    )  # the same flags again
    assert code == 0 and "steps 8 to 9" in out
    code, _, err = call(train, "--resume", "--seed", 6)
    assert code == 2 and "begun with seed 5, not 6" in err


def test_infer_with_fewer_targets_than_top_k(files, call):
    code, out, _ = call(
        infer, "--model", files / "model", "--top-k", 500, MILKY_WAY, "--targets", "is", "the"
    )
    assert code == 0 and out.count("' is'") == out.count("' the'") == 1


@pytest.mark.slow
def test_a_closed_pipe_ends_infer_quietly(files):
    command = [sys.executable, ROOT / "infer.py", "--model", files / "model", *[MILKY_WAY] * 300]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == 141
    assert not re.sub(r".*[0-9]+/300 .*", "", err).strip()  # except for the progress bar


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_output_that_cannot_be_written_is_reported_in_one_line(files, call, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        code, _, err = call(infer, "--json", "--model", files / "model", MILKY_WAY)
    assert code == 2 and err == "error: cannot write the output: No space left on device\n"


def test_weights_that_are_not_finite_are_not_saved(files, call):
    code, _, err = call(train, *small_flags(files), "--max-steps", 1, "--weight-decay", 1e308)
    assert code == 2 and "there is no model to save" in err.splitlines()[-1]
    assert not Path("runs/tutorial/model").exists()


def test_infer_without_any_run(call):
    code, _, err = call(infer, MILKY_WAY)
    assert code == 2 and "there is no trained model yet" in err


def test_help_imports_no_heavy_library():
    for script in ("train.py", "infer.py"):
        code = (
            "import sys, runpy; sys.argv = [sys.argv[1], '--help']\n"
            "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit: pass\n"
            "sys.exit(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
        )
        result = subprocess.run(
            [sys.executable, "-c", code, script], capture_output=True, text=True, cwd=ROOT
        )
        assert result.stderr.strip() == "[]" and "usage:" in result.stdout


def test_tokens_are_printed_to_an_ascii_terminal(files, call, monkeypatch):
    """Tokens of byte-level BPE contain letters such as Ġ."""
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    code, _, err = call(train, *small_flags(files), "--max-steps", 1)
    assert code == 0 and b"row 0 of the first step" in output.buffer.getvalue(), err


def test_json_is_readable_whatever_the_encoding_of_the_output(files, call, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    call(infer, "--model", files / "model", "--json", "é <mask>")
    assert json.loads(output.buffer.getvalue())[0]["sequence"].startswith("é")


OTHER_SYSTEM = """
import os, runpy, signal, sys
def no_links(*args, **kwargs):
    raise OSError("a required privilege is not held by the client")
sys.modules["fcntl"] = None
del os.setpgid, signal.SIGPIPE
os.symlink = no_links
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_both_run_without_what_only_unix_has(files):
    """As on Windows: no fcntl, no process groups, no SIGPIPE, no right to make links."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for script, *arguments in (
        ["train.py", *small_flags(files)],
        ["infer.py", MILKY_WAY],
        ["train.py", "--resume", "--max-steps", 99],
        ["train.py", *small_flags(files), "--streaming", "--max-steps", 2],
    ):
        command = [sys.executable, "-c", OTHER_SYSTEM, ROOT / script, *arguments]
        result = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, env=environment
        )
        assert result.returncode == 0, result.stderr
    assert not Path("runs/latest").exists()
