"""What isolates every test: no network, no GPU, no caches of the user's, its own runs/.

GPUs are hidden from this process and from those that it starts, so that a test computes the same on
every machine. Tests marked `cuda` see them.
"""

import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from mlm_scratch.util.errors import run_command

ROOT = Path(__file__).parents[1]

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it; tests of the Hub unset it
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # two threads wait for each other where a core is busy
torch.set_num_threads(1)
# A shell makes its background jobs ignore Ctrl-C, and their children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# ---- GPUs

HAS_CUDA = torch.cuda.is_available()  # CUDA reads the variable below once: at the first question
HIDING = pytest.MonkeyPatch()


def hide_gpus():
    """Answer whoever asks for a GPU, here or in another process, that there is none."""
    HIDING.setattr(torch.cuda, "is_available", lambda: False)
    HIDING.setattr(torch.cuda, "device_count", lambda: 0)
    HIDING.setattr(torch.backends.mps, "is_available", lambda: False)
    HIDING.setenv("CUDA_VISIBLE_DEVICES", "")
    forget_answers()


def show_gpus():
    """Undo `hide_gpus`."""
    HIDING.undo()
    forget_answers()


def forget_answers():
    """Let transformers ask again."""
    from transformers.utils.import_utils import is_torch_cuda_available

    is_torch_cuda_available.cache_clear()


@pytest.fixture(autouse=True)
def gpus_where_marked(request):
    """Show the GPUs to the tests marked `cuda`, but not to the fixtures that tests share."""
    if "cuda" not in request.keywords:
        yield
        return
    show_gpus()
    yield
    hide_gpus()


# ---- Directories and command lines


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


@pytest.fixture(scope="session", autouse=True)
def main_job(request, own_cache, tmp_path_factory):
    """Start `python train.py --epochs 2`, if it is to be tested, beside the tests before that."""
    if not any(item.path.name == "test_bundled.py" for item in request.session.items):
        yield None
        return
    directory = tmp_path_factory.mktemp("main_job")
    with (directory / "out").open("w") as out, (directory / "err").open("w") as err:
        process = subprocess.Popen(
            [sys.executable, ROOT / "train.py", "--epochs", "2"],
            cwd=directory,
            env=os.environ | {"MLM_SCRATCH_CACHE": str(directory / "cache")},
            stdout=out,
            stderr=err,
        )
    yield process, directory
    process.kill()
    process.wait()


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
def in_background(monkeypatch):
    """Save in the background, as on a GPU. Returns a list of the savers that are made."""
    from mlm_scratch.run import build

    savers, make = [], build.Saver

    def saver(in_background):
        savers.append(make(in_background=True))
        return savers[-1]

    monkeypatch.setattr(build, "Saver", saver)
    return savers


@pytest.fixture
def late_writer(in_background, monkeypatch):
    """Save in the background, but begin to write only once somebody waits for it."""
    from mlm_scratch.run import state
    from mlm_scratch.run.saver import Saver

    save, finish = state.save_checkpoint, Saver.finish
    is_awaited = threading.Event()

    def late(*args):
        is_awaited.wait()
        save(*args)

    def awaited(self):
        is_awaited.set()
        finish(self)
        is_awaited.clear()

    monkeypatch.setattr(state, "save_checkpoint", late)
    monkeypatch.setattr(Saver, "finish", awaited)


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
    """Register the markers; hide the GPUs, from the collection of tests, too."""
    hide_gpus()
    config.addinivalue_line("markers", "cuda: needs a GPU")
    config.addinivalue_line("markers", "hub: needs the real Hugging Face Hub")
    config.addinivalue_line("markers", 'slow: takes over 3 s; leave out with -m "not slow"')


def pytest_unconfigure():
    """Leave the process as it was."""
    show_gpus()


def pytest_collection_modifyitems(items):
    """Skip the tests for a GPU where there is none."""
    if not HAS_CUDA:
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="there is no GPU"))
