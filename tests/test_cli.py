"""The two command lines, as a user calls them."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, FillMaskPipeline

import infer
import train
from mlm_scratch.checkpoint import checkpoints
from mlm_scratch.errors import run_command
from tests.tiny import SENTENCES, save_roberta

ROOT = Path(__file__).parent.parent
MILKY_WAY = "The Milky Way is a <mask> galaxy."


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("files")
    torch.manual_seed(1)
    save_roberta(directory / "model")
    (directory / "a.txt").write_text("\n".join(f"{i}: {t}" for i in range(8) for t in SENTENCES))
    return directory


@pytest.fixture
def call(monkeypatch, capsys):
    """Call a command line in this process: call(train, "--epochs", "2") -> (code, out, err)."""

    def run(module, *arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = run_command(module.main)
        return code, *capsys.readouterr()

    return run


def basic(files):
    return ["--model", files / "model", "--train-file", files / "a.txt", "--block-size", 16,
            "--device", "cpu"]  # fmt: skip


def test_train_then_fill(files, call):
    code, out, _ = call(train, *basic(files), "--epochs", 2)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("recipe tutorial: ")
    assert lines[-1].strip() == f'python infer.py "{MILKY_WAY}"'  # what it says works as it stands:
    code, out, _ = call(infer, MILKY_WAY)
    assert code == 0
    assert "step by step" in out
    tokenizer = AutoTokenizer.from_pretrained("runs/latest/model")
    assert str(tokenizer(MILKY_WAY)["input_ids"]) in out
    assert out.count("The Milky Way is a") > 10  # the text, 5 fills, 5 step by step


@pytest.mark.parametrize("arguments, texts, options", [
    ([MILKY_WAY], MILKY_WAY, {}),
    (["The [MASK] Way is a <mask> galaxy.", "--top-k", 2],
     "The <mask> Way is a <mask> galaxy.", {"top_k": 2}),
    ([MILKY_WAY, "Rome <mask>", "--targets", "is", " the"], [MILKY_WAY, "Rome <mask>"],
     {"targets": ["is", " the"]}),
], ids=["one", "two masks", "two texts"])  # fmt: skip
def test_json_is_what_the_pipeline_returns(files, call, arguments, texts, options):
    code, out, _ = call(infer, "--model", files / "model", "--json", *arguments)
    assert code == 0
    reference = FillMaskPipeline(
        model=AutoModelForMaskedLM.from_pretrained(files / "model"),
        tokenizer=AutoTokenizer.from_pretrained(files / "model"),
    )
    assert json.loads(out) == reference(texts, **options)


def test_texts_from_standard_input(files, call):
    as_arguments = call(infer, "--model", files / "model", "--json", MILKY_WAY, "<mask>")
    as_lines = call(infer, "--model", files / "model", "--json", stdin=f"{MILKY_WAY}\n\n<mask>\n")
    assert as_lines == as_arguments


def test_resume_takes_the_settings_of_the_run(files, call):
    call(train, *basic(files), "--max-steps", 4, "--save-every", 2, "--seed", 5)
    code, out, _ = call(train, "--resume", "--max-steps", 8)
    assert code == 0 and "steps 4 to 8" in out
    saved = json.loads(Path("runs/latest/run.json").read_text())["config"]
    assert saved["seed"] == 5 and saved["max_steps"] == 8
    code, out, _ = call(train, *basic(files), "--resume", "--max-steps", 9)  # the same line again
    assert code == 0 and "steps 8 to 9" in out
    code, _, err = call(train, "--resume", "--seed", 6)
    assert code == 2 and "begun with seed 5, not 6" in err


WRONG_TRAIN = [
    (["--epochs", "many"], "--epochs: invalid float value: 'many'"),
    (["--epochs", 0], "--epochs must be above 0"),
    (["--epochs", "nan"], "--epochs must be a number"),
    (["--max-steps", 0], "--max-steps must be at least 1"),
    (["--batch-size", -1], "--batch-size must be at least 1"),
    (["--accumulate", 0], "--accumulate must be at least 1"),
    (["--lr", 0], "--lr must be above 0"),
    (["--lr", "inf"], "--lr must be a number"),
    (["--warmup-steps", -1], "--warmup-steps must be at least 0"),
    (["--mlm-probability", 1.5], "--mlm-probability must be at most 1"),
    (["--mask-replace-prob", 0.95], "add up to more than 1"),
    (["--eval-fraction", 1], "--eval-fraction must be below 1"),
    (["--block-size", 65], "--block-size 65 is over the limit"),
    (["--grouping", "pages"], "invalid choice: 'pages'"),
    (["--precision", "fp8"], "invalid choice: 'fp8'"),
    (["--device", "abacus"], "--device abacus cannot be used"),
    (["--seed", -1], "--seed must be at least 0"),
    (["--keep", 0], "--keep must be at least 1"),
    (["--speed", 3], "unrecognized arguments: --speed 3"),
    (["--epoch", 3], "unrecognized arguments: --epoch 3"),
    (["--text-column", "body"], "has no column 'body'; it has text"),
    (["--dataset", "x/y"], "--dataset and --train-file contradict each other"),
    (["--eval-file", "e.txt", "--eval-fraction", 0.1], "contradict each other"),
    (["--eval-file", "e.txt"], "e.txt: no such file"),
    (["--model", "no/such/model"], "cannot load a tokenizer from no/such/model"),
    (["--model", "bundled"], "--init scratch"),
    (["--output-dir", "a_file"], "a_file is not a directory"),
    (["--output-dir", ""], "--output-dir is empty"),
    (["--output-dir", "foreign"], "foreign holds models that are not of a run"),
    (["--output-dir", "a_run"], "a_run already holds a run: add --resume"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, message", WRONG_TRAIN, ids=lambda value: str(value)[:40])
def test_what_train_cannot_do_is_one_line_and_exit_code_2(files, call, arguments, message):
    Path("a_file").touch()
    Path("a_run").mkdir()
    Path("foreign/checkpoint-500").mkdir(parents=True)
    Path("a_run/run.json").touch()
    before = sorted(Path().rglob("*"))
    code, _, err = call(train, *basic(files), *arguments)
    errors = [line for line in re.split(r"[\r\n]+", err) if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in errors[0]
    assert "Traceback" not in err
    assert sorted(Path().rglob("*")) == before  # nothing half made


@pytest.mark.parametrize("arguments, message", [
    (["--resume"], "there is no run in"),
    (["--resume", "--output-dir", "nowhere"], "there is no run in nowhere"),
    (["--dataset", "no/such", "--model", "x"], "cannot load data set no/such"),
])  # fmt: skip
def test_what_cannot_be_begun_at_all(call, arguments, message):
    code, _, err = call(train, *arguments)
    assert code == 2 and message in err and "Traceback" not in err


@pytest.mark.parametrize("arguments, message", [
    (["no mask"], "no <mask> in the text 'no mask'"),
    ([""], "no <mask> in the text ''"),
    ([], "no text: python infer.py"),
    ([MILKY_WAY, "--top-k", 0], "top-k must be from 1 to 320"),
    (["long " * 99 + "<mask>"], "the model takes 64"),
    ([MILKY_WAY, "--model", "nowhere"], "cannot load a tokenizer from nowhere"),
    ([MILKY_WAY, "--device", "abacus"], "--device abacus cannot be used"),
    ([MILKY_WAY, "--targets", ""], "none of the targets"),
    (["\udcff <mask>"], "is not UTF-8"),
])  # fmt: skip
def test_what_infer_cannot_do_is_one_line_and_exit_code_2(files, call, arguments, message):
    code, out, err = call(infer, "--model", files / "model", *arguments)
    assert code == 2 and out == ""
    assert message in err.splitlines()[-1] and "Traceback" not in err


def test_infer_with_few_targets_and_with_a_reader_that_leaves(files, call):
    code, out, _ = call(infer, "--model", files / "model", "--top-k", 500, MILKY_WAY,
                        "--targets", "is", "the")  # fmt: skip
    assert code == 0 and "top 500" in out
    command = [sys.executable, ROOT / "infer.py", "--model", files / "model", *[MILKY_WAY] * 300]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141


def test_weights_that_are_lost_are_no_result(files, call):
    code, _, err = call(train, *basic(files), "--max-steps", 1, "--weight-decay", 1e308)
    assert code == 2 and "there is no model to save" in err.splitlines()[-1]
    assert not Path("runs/tutorial/model").exists()


def test_infer_without_any_run(call):
    code, _, err = call(infer, MILKY_WAY)
    assert code == 2 and "there is no trained model yet" in err


def test_help_of_both_is_there_at_once():
    for script in ("train.py", "infer.py"):
        heavy = (
            "import sys, runpy; sys.argv = [sys.argv[1], '--help']\n"
            "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit: pass\n"
            "sys.exit(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
        )
        result = subprocess.run(
            [sys.executable, "-c", heavy, script], capture_output=True, text=True, cwd=ROOT
        )
        assert result.stderr.strip() == "[]" and "usage:" in result.stdout


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_with_a_checkpoint_to_go_on_from(files, call, number, code):
    arguments = [*basic(files), "--max-steps", 3000, "--log-every", 1, "--save-every", 0]
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    metrics = Path("runs/tutorial/metrics.jsonl")
    while not (metrics.exists() and metrics.read_text().count("\n") > 5):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "python train.py --resume --output-dir runs/tutorial" in out
    (checkpoint,) = checkpoints(Path("runs/tutorial"))
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 5 <= step < 3000
    resumed, out, _ = call(train, "--resume", "--output-dir", "runs/tutorial", "--max-steps",
                           step + 3)  # fmt: skip
    assert resumed == 0 and f"steps {step} to {step + 3}" in out
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == sorted(steps) and set(range(1, step + 4)) == set(steps)
