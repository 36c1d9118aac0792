"""The same contents are the same run, wherever they lie by the time of a resume."""

import json
import shutil
from pathlib import Path

import pytest

import train as command
from mlm_scratch.config import changed, flat
from mlm_scratch.run.directory import resumed_config
from mlm_scratch.run.session import train
from mlm_scratch.util.errors import UserError
from tests.support.same import assert_same_run
from tests.support.tiny import SENTENCES, small_config, write_text

SETTINGS = {"max_steps": 8, "save_every": 4, "keep": 5, "log_every": 2}


@pytest.fixture
def home(files, tmp_path):
    """A model, a text, another to evaluate on, and new words, which will all be moved."""
    directory = tmp_path / "here"
    shutil.copytree(files, directory)
    write_text(directory / "b.txt", SENTENCES)
    write_text(directory / "words.txt", ["chloroplasts"])
    return directory


def config(home, **settings):
    paths = {"add_tokens": str(home / "words.txt"), "eval_file": (str(home / "b.txt"),)}
    return changed(small_config(home, **SETTINGS), **paths, **settings)


def stopped(run_dir, at):
    """Leave what a run has that was killed after its checkpoint of step `at`, or before any."""
    for directory in [run_dir / "model", *run_dir.glob("checkpoint-*")]:
        if directory.name != f"checkpoint-{at}":
            shutil.rmtree(directory)


def moved(home, *, renamed):
    """Move all of it; return the flags that say where it is now, without the model."""
    there = home.rename(home.with_name("there"))
    names = {"a.txt": "--train-file", "b.txt": "--eval-file", "words.txt": "--add-tokens"}
    flags = []
    for name, flag in names.items():
        new = there / (f"new-{name}" if renamed else name)
        (there / name).rename(new)
        flags += [flag, new]
    return there, flags


@pytest.mark.slow
@pytest.mark.parametrize("at", [4, None])
@pytest.mark.parametrize("renamed", [False, True])
def test_a_run_resumes_where_its_files_are_now(home, call, at, renamed):
    """Run directory, texts and words; the model, too, where no checkpoint brings it."""
    whole = train(config(home, output_dir="whole"))
    shutil.copytree(whole, "run")
    stopped(Path("run"), at)
    there, flags = moved(home, renamed=renamed)
    Path("run").rename("renamed")
    code, _, err = call(command, "--resume", "--output-dir", "renamed")
    assert code == 2 and "a.txt is gone: say where it is now with --train-file" in err
    code, _, err = call(command, "--resume", "--output-dir", "renamed", *flags)
    if at is None:
        assert code == 2 and "model is gone: say where it is now with --model" in err
        flags += ["--model", there / "model"]
        code, _, err = call(command, "--resume", "--output-dir", "renamed", *flags)
    assert code == 0, err
    assert_same_run(whole, Path("renamed"))
    assert call(command, "--resume", "--output-dir", "renamed")[0] == 0  # it knows by now
    assert str(there.parent) not in Path("renamed/model/README.md").read_text()


def edit_text(home):
    (home / "a.txt").write_text((home / "a.txt").read_text().replace("0:", "9:"))


def edit_evaluation(home):
    (home / "b.txt").write_text((home / "b.txt").read_text() + "More.\n")


def edit_words(home):
    (home / "words.txt").write_text("mitochondria\n")


def edit_weights(home):
    path = home / "model/model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def edit_tokenizer(home):
    path = home / "model/tokenizer.json"
    before = path.read_text()
    path.write_text(
        before.replace('"trim_offsets":true', '"trim_offsets":false').replace(
            '"trim_offsets": true', '"trim_offsets": false'
        )
    )
    assert path.read_text() != before


EDITS = {
    edit_text: "the training text has changed",
    edit_evaluation: "the evaluation text has changed",
    edit_words: "the file of --add-tokens has changed",
    edit_weights: "the model has changed",
    edit_tokenizer: "the model has changed",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "edit, at", [*((edit, None) for edit in EDITS), (edit_text, 4), (edit_weights, 4)]
)
def test_what_was_edited_is_not_the_same_run(home, call, edit, at):
    """Where it lay, or elsewhere; a model or words that a checkpoint brings are not read again."""
    run_dir = train(config(home, output_dir="run"))
    stopped(run_dir, at)
    edit(home)
    is_read = at is None or edit in (edit_text, edit_evaluation)
    there, flags = moved(home, renamed=True)
    code, _, err = call(command, "--resume", *flags, "--model", there / "model")
    assert code == 2 and EDITS[edit] in err
    there.rename(home)
    for name in ("a.txt", "b.txt", "words.txt"):
        (home / f"new-{name}").rename(home / name)
    code, _, err = call(command, "--resume", "--output-dir", "run")
    assert code == (2 if is_read else 0) and (EDITS[edit] in err) == is_read


def test_a_stream_is_known_by_sizes_and_first_bytes(files, tmp_path):
    paths = [tmp_path / f"{number}.txt" for number in range(2)]
    for path in paths:
        write_text(path, [f"{path.stem}{i} {SENTENCES[i % 6]}" for i in range(300)])
    settings = {"streaming": True, "grouping": "blocks", "split": "train", "max_steps": 2}
    train(small_config(files, train_file=tuple(map(str, paths)), output_dir="run", **settings))
    renamed = [path.rename(path.with_suffix(".moved.txt")) for path in paths]
    with pytest.raises(UserError, match=r"0\.txt is gone"):
        resumed_config("run", {"max_steps": 4})
    now = {"train_file": tuple(map(str, renamed)), "max_steps": 4}
    train(resumed_config("run", now), resume=True)
    raw = renamed[1].read_bytes()
    renamed[1].write_bytes(raw[:99] + b"?" + raw[100:])
    with pytest.raises(UserError, match="the training text has changed"):
        train(resumed_config("run", {"max_steps": 6}), resume=True)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "no/such"], "--model: there is no directory no/such, or no model in it"),
        (["--model", "bundled"], "the model has changed"),
        (["--train-file", "no.txt"], "no.txt: no such file"),
        (["--add-tokens", "no.txt"], "no.txt: No such file"),
        (["--add-tokens", "."], "Is a directory"),
        (["--dataset", ""], "--dataset is empty"),
    ],
)
def test_what_is_mistyped_at_a_resume_is_named(home, call, flags, message, monkeypatch):
    train(config(home, output_dir="run"))
    shutil.copytree(home / "model", "bundled")
    stopped(Path("run"), None)
    code, _, err = call(command, "--resume", "--output-dir", "run", *flags)
    assert code == 2 and message in err.splitlines()[-1] and "Traceback" not in err


def test_another_data_set_is_not_looked_up_at_the_commit_of_the_first(home):
    """A copy of it under another name on the Hub has its own commits."""
    run_dir = train(config(home, output_dir="run"))
    noted = json.loads((run_dir / "run.json").read_text())
    noted["config"]["text"] |= {"train_file": [], "dataset": "a/b", "dataset_commit": "1" * 40}
    (run_dir / "run.json").write_text(json.dumps(noted))
    assert resumed_config("run", {}).text.dataset_commit == "1" * 40
    text = resumed_config("run", {"dataset": "c/d"}).text
    assert (text.dataset, text.dataset_commit, text.train_file) == ("c/d", None, ())


def test_run_json_has_the_digests(home):
    run_dir = train(config(home, output_dir="run"))
    noted = json.loads((run_dir / "run.json").read_text())["config"]
    digests = [noted["model"][name] for name in ("model_digest", "words_digest")]
    digests += [noted["text"]["text_digest"], noted["evaluation"]["eval_digest"]]
    assert all(len(digest) == 64 for digest in digests) and len(set(digests)) == 4
    assert flat(resumed_config("run", {}))["text_digest"] == digests[2]
