"""What isolates every test: no network, no caches of the user's, its own runs/."""

import io
import os
import signal
import sys

import pytest

from mlm_scratch.util.errors import run_command

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it; tests of the Hub unset it
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A shell makes its background jobs ignore Ctrl-C, and their children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Cache prepared text in a directory of this test run."""
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLM_SCRATCH_CACHE", str(base / "mlm_scratch"))
        patch.setenv("HF_DATASETS_CACHE", str(base / "datasets"))  # for other processes
        patch.setattr("datasets.config.HF_DATASETS_CACHE", base / "datasets")
        patch.chdir(base)  # runs/ of module fixtures
        yield


@pytest.fixture(autouse=True)
def own_directory(own_cache, tmp_path_factory, monkeypatch):
    """Give each test its own runs/."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command line in this process; return its exit code, output and errors."""

    def run(module, *arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = run_command(module.main)
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A model with dropout and a text of 48 short documents. Read only."""
    from tests.support.tiny import save_files  # not before the environment is set

    return save_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="session")
def files_without_dropout(tmp_path_factory):
    """The same text; a model without dropout. Read only."""
    from tests.support.tiny import NO_DROPOUT, save_files

    return save_files(tmp_path_factory.mktemp("files"), **NO_DROPOUT)


@pytest.fixture
def rows_of_each_pass(monkeypatch):
    """The number of rows of each forward pass."""
    from transformers import RobertaForMaskedLM

    forward, rows = RobertaForMaskedLM.forward, []

    def counted(self, input_ids, *args, **kwargs):
        rows.append(len(input_ids))
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(RobertaForMaskedLM, "forward", counted)
    return rows


def pytest_configure(config):
    """Register the markers."""
    config.addinivalue_line("markers", "cuda: needs a GPU")
    config.addinivalue_line("markers", "hub: needs the real Hugging Face Hub")
    config.addinivalue_line("markers", 'slow: takes over 3 s; leave out with -m "not slow"')


def pytest_collection_modifyitems(items):
    """Skip the tests for a GPU where there is none."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="there is no GPU"))
