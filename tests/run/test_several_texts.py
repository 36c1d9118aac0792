"""Several texts to evaluate on: each as `evaluate` finds it, named as in Trainer."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForMaskedLM, AutoTokenizer, Trainer, TrainingArguments

import train as command
from mlm_scratch.config import changed
from mlm_scratch.data.documents import load_documents
from mlm_scratch.data.rows import prepare_rows
from mlm_scratch.evaluate import evaluate
from mlm_scratch.model import MaskedLM
from mlm_scratch.precision import choose_precision
from mlm_scratch.report.metrics import read_metrics
from mlm_scratch.run.session import train
from mlm_scratch.util.errors import UserError
from tests.support.tiny import SENTENCES, small_config, small_flags, write_text


@pytest.fixture
def texts(tmp_path):
    """Two texts, and one whose name looks like a name and a path."""
    write_text(tmp_path / "notes.txt", SENTENCES[:4])
    write_text(tmp_path / "wiki.txt", [f"{i} #%&{{}}~^`$@" for i in range(20)])
    write_text(tmp_path / "a=b.txt", SENTENCES[4:6])
    return tmp_path


def config_of(files, *eval_file, **settings):
    settings = {"max_steps": 4, "eval_every": 2, **settings}
    return changed(small_config(files), eval_fraction=None, eval_file=eval_file, **settings)


def by_hand(run_dir, config, path):
    """Evaluate the final model of a run on a text alone."""
    alone = changed(config, eval_file=(str(path),))
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    rows = prepare_rows(load_documents(alone)[1], tokenizer, alone)
    model = MaskedLM(AutoModelForMaskedLM.from_pretrained(run_dir / "model"))
    return evaluate(model, tokenizer, rows, alone, choose_precision("cpu", "fp32"))


def test_each_text_has_the_values_of_an_evaluation_by_hand(files, texts, capsys):
    config = config_of(files, f"domain={texts / 'notes.txt'}", f"general={texts / 'wiki.txt'}")
    run_dir = train(config)
    out = capsys.readouterr().out
    last = [line for line in read_metrics(run_dir) if "eval_loss" in line][-1]
    domain, general = (by_hand(run_dir, config, texts / name) for name in ("notes.txt", "wiki.txt"))
    for name, value in domain.items():
        assert last[name] == pytest.approx(value, rel=1e-5)
    for name, value in general.items():
        named = f"eval_general_{name.removeprefix('eval_')}"
        assert last[named] == pytest.approx(value, rel=1e-5)
    assert f"    general: loss {last['eval_general_loss']:.4f}, perplexity " in out
    assert ", general " in next(line for line in out.splitlines() if "4 steps in" in line)
    results = json.loads((run_dir / "results.json").read_text())
    assert results["after"]["eval_general_loss"] == last["eval_general_loss"]
    card = (run_dir / "model" / "README.md").read_text()
    assert "that of general" in card and "In the text general: " in card
    assert f"{texts}" not in card and "general=wiki.txt" in card
    assert "evaluation, general" in (run_dir / "report.html").read_text()
    curves = EventAccumulator(str(run_dir / "logs")).Reload().Tags()["scalars"]
    assert {"eval/loss", "eval/general_loss", "eval/general_perplexity"} <= {*curves}


def test_the_second_text_is_named_as_trainer_names_it_in_a_dict(files, texts, tmp_path):
    model = AutoModelForMaskedLM.from_pretrained(files / "model")
    row = {"input_ids": [0, 5, 6, 2], "labels": [-100, 5, -100, -100]}
    arguments = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none")
    theirs = Trainer(model, arguments, eval_dataset={"general": [row]}).evaluate()
    (loss,) = [name for name in theirs if name.endswith("loss")]
    paths = (f"domain={texts / 'notes.txt'}", f"general={texts / 'wiki.txt'}")
    ours = read_metrics(train(config_of(files, *paths)))[0]
    assert loss in ours and loss != "eval_loss"


def test_the_first_decides_what_is_best(files, texts):
    """On the second the loss rises from the start: the model forgets it."""
    paths = [f"domain={texts / 'notes.txt'}", f"general={texts / 'wiki.txt'}"]
    best = []
    for order in (paths, paths[::-1]):
        settings = {"lr": 3e-3, "max_steps": 40, "eval_every": 5, "best": True}
        run_dir = train(config_of(files, *order, **settings))
        losses = {
            line["step"]: line["eval_loss"] for line in read_metrics(run_dir) if "eval_loss" in line
        }
        best.append(min(losses, key=losses.get))
        assert json.loads((run_dir / "results.json").read_text())["step"] == best[-1]
    assert best[0] != best[1]


def test_a_path_is_a_path_where_a_file_has_that_very_name(files, texts, call, monkeypatch):
    monkeypatch.chdir(texts)
    flags = [*small_flags(files), "--max-steps", 1]
    code, out, err = call(command, *flags, "--eval-file", "a=b.txt", "wiki.txt")
    assert code == 0 and "22 to evaluate on: " in out, err  # one text of both files
    code, out, err = call(command, *flags, "--eval-file", "a=wiki.txt", "b=a=b.txt")
    assert code == 0 and "20 to evaluate on: " in out and "2 to evaluate on: " in out, err
    saved = json.loads(Path("runs/latest/run.json").read_text())["config"]["evaluation"]
    assert saved["eval_file"] == [f"a={texts / 'wiki.txt'}", f"b={texts / 'a=b.txt'}"]
    code, _, err = call(command, *flags, "--eval-file", "a=wiki.txt", "notes.txt")
    assert code == 2 and "a file without a name comes first, or all texts have names" in err
    code, out, err = call(
        command, *flags, "--eval-file", "a=wiki.txt", "--eval-file", "my-b=a=b.txt"
    )
    assert code == 0 and "20 to evaluate on: " in out and "    my-b: loss " in out, err
    for empty in ("a=", ""):
        code, _, err = call(command, *flags, "--eval-file", empty)
        assert code == 2 and "--eval-file: a path is empty" in err
    code, _, err = call(command, *flags, "--eval-file", "a=nowhere.txt")
    assert code == 2 and "nowhere.txt" in err.splitlines()[-1]


def test_a_resume_knows_all_texts(files, texts):
    paths = [f"domain={texts / 'notes.txt'}", f"general={texts / 'wiki.txt'}"]
    settings = config_of(files, *paths, output_dir="run")
    train(settings)
    moved = Path(texts / "wiki.txt").rename(texts / "moved.txt")
    again = changed(settings, max_steps=6, eval_file=(paths[0], f"general={moved}"))
    lines = read_metrics(train(again, resume=True))
    assert [line["step"] for line in lines if "eval_general_loss" in line] == [0, 2, 4, 6]
    write_text(moved, ["another text"] * 20)
    with pytest.raises(UserError, match="the evaluation text has changed"):
        train(changed(again, max_steps=8), resume=True)
