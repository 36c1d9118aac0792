"""What every test is kept from: the network, the user's caches, tokens in the environment."""

import io
import os
import signal
import sys

import pytest

from mlm_scratch.util.errors import run_command

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it; tests of the Hub unset it
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A shell lets its background jobs ignore Ctrl-C, and what they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Prepared text goes to a directory of this test run's own."""
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLM_SCRATCH_CACHE", str(base / "mlm_scratch"))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", base / "datasets")
        patch.chdir(base)  # what a fixture of a whole module leaves in runs/ stays here
        yield


@pytest.fixture(autouse=True)
def own_directory(own_cache, tmp_path_factory, monkeypatch):
    """Each test has its own runs/."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture
def call(monkeypatch, capsys):
    """Call a command line in this process: call(train, "--epochs", "2") -> (code, out, err)."""

    def run(module, *arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = run_command(module.main)
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model directory and a text of 48 short documents."""
    directory = tmp_path_factory.mktemp("files")
    import torch  # not before the environment is set

    from tests.support.tiny import SENTENCES, save_roberta

    torch.manual_seed(1)
    save_roberta(directory / "model")
    text = directory / "a.txt"
    text.write_text("\n".join(f"{i}: {text}" for i in range(8) for text in SENTENCES))
    return directory


def pytest_configure(config):
    """Describe the markers that skip themselves."""
    config.addinivalue_line("markers", "cuda: needs a GPU")
    config.addinivalue_line("markers", "hub: needs the real Hugging Face Hub")


def pytest_collection_modifyitems(items):
    """Skip the tests for a GPU where there is none."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="there is no GPU"))
