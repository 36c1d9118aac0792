"""The guide to adapting a model, followed from its first command to its last program."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

import infer
import train
from mlm_scratch.probe import __main__ as probe
from mlm_scratch.util.runs import checkpoints
from tests.support.processes import forget_after
from tests.support.tiny import NUMBERED, SENTENCES, write_text

GUIDE = (Path(__file__).parents[1] / "mlm_scratch/ADAPTING.md").read_text(encoding="utf-8")
MODEL = "distilbert/distilroberta-base"
PROGRAMS = {"train.py": train, "infer.py": infer, "-m": probe}


def commands():
    """The arguments of every `python` command of the guide."""
    for block in re.findall(r"```bash\n(.*?)```", GUIDE, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "python" in words:
                yield words[words.index("python") + 1 :]


def python_block(words):
    (block,) = (code for code in re.findall(r"```python\n(.*?)```", GUIDE, re.S) if words in code)
    return block


@pytest.fixture
def directory(tmp_path, files, monkeypatch):
    """What the guide asks for, small, and the model under its name."""
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "train.txt", NUMBERED)
    write_text(tmp_path / "domain.txt", SENTENCES[:3])
    write_text(tmp_path / "general.txt", SENTENCES[3:])
    write_text(tmp_path / "pairs.tsv", ["Water boils.\tWater boil.", "Paris is.\tParis are."])
    rows = [f"Water boils {n}.,water\nParis is {n}.,paris" for n in range(10)]
    write_text(tmp_path / "labelled.csv", ["text,label", *rows])
    shutil.copytree(files / "model", MODEL)
    return tmp_path


@pytest.mark.slow
def test_the_guide_from_its_first_command_to_its_last_program(directory, call):
    outputs = []
    small = ["--block-size", 16, "--device", "cpu", "--precision", "fp32"]
    for program, *arguments in commands():
        arguments = arguments[1:] if program == "-m" else arguments
        extra = small if program == "train.py" else []
        code, out, err = call(PROGRAMS[program], *arguments, *extra)
        assert code == 0, err
        outputs.append(out)
    dry, adapted, before, after, probed, job = outputs
    assert "a dry run: no run was begun" in dry and not Path("runs/tutorial").exists()
    assert "    general: loss " in adapted and "[France]" in adapted
    for pairs in (before, after):
        assert re.search(r"^all pairs +\d +\d +2 +\d\.\d{3} +\d\.\d{3} to \d\.\d{3}$", pairs, re.M)
    assert re.search(r"^[+-]0\.\d+ +[+-]\d\.\d+ to [+-]\d\.\d+ .*minus the first$", probed, re.M)
    assert "no run in " in job and Path("runs/notes/model").is_dir()
    results = json.loads(Path("runs/adapted/results.json").read_text())
    assert results["after"]["eval_loss"] < results["before"]["eval_loss"]

    # The model in use.
    exec(python_block("AutoModelForSequenceClassification"), {})
    classifier = AutoModelForSequenceClassification.from_pretrained("classifier")
    encoder = AutoModelForMaskedLM.from_pretrained("runs/adapted/model").base_model
    assert classifier.config.num_labels == 2
    moved = classifier.base_model.embeddings.word_embeddings.weight
    ours = encoder.embeddings.word_embeddings.weight
    assert 0 < (moved - ours).abs().max() < 1e-3  # it starts from ours, and 6 steps are small


def test_sentence_transformers_takes_the_model(directory):
    """It is no dependency of this project: where it is not installed, this skips itself."""
    pytest.importorskip("sentence_transformers")
    shutil.copytree(MODEL, "runs/adapted/model")
    names = {}
    exec(python_block("sentence_transformers"), names)
    assert names["embeddings"].shape == (2, 32)


def test_one_command_begins_a_run_and_goes_on_with_it(directory, call):
    """As after a kill: with the flags of the guide, none of them edited."""
    *_, (_, *job) = commands()
    assert "--resume" in job
    small = ["--block-size", 16, "--device", "cpu", "--save-every", 20, "--keep", 9]
    code, out, err = call(train, *job, *small)
    assert code == 0 and "no run in runs/notes yet: beginning one" in out, err
    saved = [path.name for path in checkpoints(Path("runs/notes"))]
    metrics = Path("runs/notes/metrics.jsonl").read_text()
    forget_after(40, Path("runs/notes"))
    shutil.rmtree("runs/notes/model")
    code, out, err = call(train, *job, *small)
    assert code == 0 and "resuming runs/notes" in out and "steps 40 to " in out, err
    assert "changed: " not in out
    assert [path.name for path in checkpoints(Path("runs/notes"))] == saved
    assert Path("runs/notes/metrics.jsonl").read_text() == metrics
    assert call(train, *job, *small)[0] == 0  # once more, when it has ended


def test_a_mistyped_directory_begins_no_run(call):
    for more in ([], ["--max-steps", 9], ["--lr", 1e-4, "--epochs", 9]):
        code, _, err = call(train, "--resume", "--output-dir", "nowhere", *more)
        assert code == 2 and "there is no run in nowhere (to begin one there, say what" in err
        assert not Path("nowhere").exists()
