"""The recipe `tutorial` and the choice `auto`, with the Hub's real clients.

A stand-in on loopback serves a small model and a small data set under the tutorial's names.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from mlm_scratch.config import SECTIONS, TUTORIAL, flat
from mlm_scratch.hf.hub import hub_answers
from mlm_scratch.report.metrics import read_metrics
from tests.support.hub_server import StandInHub
from tests.support.processes import ROOT
from tests.support.tiny import SENTENCES, save_roberta

MILKY_WAY = "The Milky Way is a <mask> galaxy."


def questions(count):
    """Rows in the schema of ELI5-category."""
    return [
        {
            "q_id": f"q{i}",
            "title": f"Why {i}?",
            "selftext": "",
            "category": "Physics",
            "subreddit": "explainlikeimfive",
            "answers": {
                "a_id": [f"a{i}", f"b{i}"],
                "text": [f"Because of {i}: {' '.join(SENTENCES)}", " ".join(SENTENCES[i % 6 :])],
                "score": [i, -1],
                "text_urls": [[], []],
            },
            "title_urls": ["url"],
            "selftext_urls": ["url"],
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The stand-in, not listening yet."""
    root = tmp_path_factory.mktemp("repositories")
    torch.manual_seed(1)
    save_roberta(root / "model", max_position_embeddings=130 + 2)
    (root / "data/data").mkdir(parents=True)
    table = pyarrow.Table.from_pylist(questions(60))
    pyarrow.parquet.write_table(table, root / "data/data/train-00000-of-00001.parquet")
    return StandInHub(
        models={TUTORIAL.model.name: root / "model"},
        datasets={TUTORIAL.text.dataset: root / "data"},
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The clients' cache, filled by the first test and read by later ones."""
    return tmp_path_factory.mktemp("hf_home")


def call(environment, *arguments, script="train.py"):
    """Run a command in a new interpreter: the clients read the environment at import."""
    return subprocess.run(
        [sys.executable, ROOT / script, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_auto_takes_the_tutorial_if_the_hub_answers_and_it_runs_to_the_end(hub, home):
    token = "hf_" + 34 * "x"
    with hub:
        run = call(hub.environment(home) | {"HF_TOKEN": token})
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("recipe tutorial: the Hugging Face Hub answers\n")
    written = b"".join(path.read_bytes() for path in Path("runs").rglob("*") if path.is_file())
    assert len(written) > 10**5 and token.encode() not in written
    assert token not in run.stdout + run.stderr
    assert "Traceback" not in run.stderr and "Retrying" not in run.stderr
    config = json.loads(Path("runs/tutorial/run.json").read_text())["config"]
    noted = {name: value for section in SECTIONS for name, value in config[section].items()}
    found = {"output_dir": "runs/tutorial", "precision": "fp32"}  # the model is tiny
    for section, name in (("text", "text_digest"), ("evaluation", "eval_digest")):
        assert len(found.setdefault(name, config[section][name])) == 64
    found["model_commit"] = hub.repository("models", TUTORIAL.model.name).sha
    found["dataset_commit"] = hub.repository("datasets", TUTORIAL.text.dataset).sha
    assert noted | {"recipe": config["recipe"]} == json.loads(json.dumps(flat(TUTORIAL))) | found
    commit = r"48 documents of data set dany0407/eli5_category \(version [0-9a-f]{12}\), "
    assert re.search(commit, run.stdout)
    lines = read_metrics(Path("runs/tutorial"))
    assert [line["epoch"] for line in lines if "eval_loss" in line] == [0.0, 1.0, 2.0]
    assert [line["step"] for line in lines if "loss" in line][:2] == [10, 20]
    fills = call(os.environ, MILKY_WAY, "--json", script="infer.py")
    assert len(json.loads(fills.stdout)) == 5


@pytest.mark.slow
def test_a_revision_is_pinned_and_a_resume_loads_what_the_run_was_begun_with(tmp_path):
    """A tag, and later a commit of main that is no longer the newest one."""
    torch.manual_seed(1)
    save_roberta(tmp_path / "model", max_position_embeddings=130 + 2)
    hub = StandInHub()
    for number, rows in enumerate((60, 40)):  # two commits of each
        (tmp_path / f"data{number}").mkdir()
        path = tmp_path / f"data{number}/train.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(questions(rows)), path)
        (tmp_path / "model" / "number").write_text(str(number))
        tag = "v1" if number == 0 else None
        commits = [
            hub.push("models", "user/model", tmp_path / "model", tag),
            hub.push("datasets", "user/data", tmp_path / f"data{number}", tag),
        ]
        if number == 0:
            first = commits
    flags = ["--model", "user/model", "--dataset", "user/data", "--text-column", "answers.text"]
    flags += ["--max-steps", "2", "--device", "cpu", "--precision", "fp32"]

    def commits_of(run):
        config = json.loads(Path(run, "run.json").read_text())["config"]
        return [config["model"]["model_commit"], config["text"]["dataset_commit"]]

    with hub:
        environment = hub.environment(tmp_path / "home")
        for name, revision in (("tag", ["--revision", "v1"]), ("newest", [])):
            run = call(environment, *flags, *revision, "--output-dir", name)
            assert run.returncode == 0, run.stderr
            assert commits_of(name) == (first if revision else commits)
            documents, commit = (48, first) if revision else (32, commits)
            assert (
                f"text: {documents} documents of data set user/data (version {commit[1][:12]})"
                in run.stdout
            )
            assert f"(user/model at {commit[0][:12]}, pretrained)" in run.stdout
        hub.push("datasets", "user/data", tmp_path / "data0")  # main moves on
        resumed = call(environment, "--resume", "--output-dir", "newest", "--max-steps", "4")
        assert resumed.returncode == 0, resumed.stderr
        assert "text: 32 documents" in resumed.stdout and commits_of("newest") == commits
        of_each = ["--revision", "v1", "--dataset-revision", commits[1]]
        run = call(environment, *flags, *of_each, "--streaming", "--output-dir", "stream")
        assert run.returncode == 0, run.stderr
        assert commits_of("stream") == [first[0], commits[1]]
        unknown = call(environment, *flags, "--revision", "v9")
        assert unknown.returncode == 2 and len(unknown.stderr.splitlines()) == 1


@pytest.mark.slow
def test_auto_takes_the_tutorial_from_the_cache_if_nothing_answers(hub, home):
    environment = hub.environment(home) | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    run = call(environment, "--max-steps", "2")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("recipe tutorial: the Hub does not answer, but its model and")
    assert "Retrying" not in run.stderr


@pytest.mark.slow
def test_auto_takes_the_bundled_recipe_without_hub_and_cache(hub, tmp_path):
    environment = hub.environment(tmp_path) | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    run = call(environment, "--max-steps", "2", "--eval-fraction", "0")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("recipe bundled: no download needed; the Hub does not answer")
    assert Path("runs/bundled/model/model.safetensors").is_file()


@pytest.mark.slow
def test_a_hub_that_accepts_and_never_answers_is_given_up_in_time(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
        start = time.monotonic()
        assert not hub_answers(TUTORIAL.model.name)
        assert 2 < time.monotonic() - start < 60  # 3 s, on a machine with nothing else to do


@pytest.mark.slow
def test_the_tutorial_by_name_is_an_error_without_hub_and_cache(hub, tmp_path):
    environment = hub.environment(tmp_path, offline=True)
    run = call(environment, "--recipe", "tutorial")
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("error: cannot load")
    assert "Traceback" not in run.stderr
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_model_that_the_hub_does_not_have_is_an_error(hub, home):
    with hub:
        run = call(hub.environment(home) | {"HF_TOKEN": "hf_secret"}, "--model", "no/such")
    assert run.returncode == 2 and "hf_secret" not in run.stdout + run.stderr
    assert "no/such" in run.stderr.splitlines()[-1] and "Traceback" not in run.stderr


@pytest.mark.hub
@pytest.mark.slow
def test_the_real_hub():
    """The real tutorial, shortened: the ids are those that it prints, and a fill is spiral."""
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    probe = "from mlm_scratch.hf.hub import *; print(hub_answers(TUTORIAL.model.name, 10))"
    answer = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    if answer.stdout.strip() != "True":
        pytest.skip("the Hugging Face Hub does not answer")
    run = call(environment, "--recipe", "tutorial", "--max-steps", "20", "--eval-fraction", "0.02")
    assert run.returncode == 0, run.stderr
    fills = call(environment, MILKY_WAY, script="infer.py").stdout
    assert "[0, 133, 36713, 4846, 16, 10, 50264, 22703, 4, 2]" in fills
    assert "The Milky Way is a spiral galaxy." in fills
