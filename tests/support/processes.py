"""train.py in processes of its own: started by torchrun, or forked from one that has imported it.

A new interpreter needs about four seconds for its imports, a fork a tenth of one.
"""

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from mlm_scratch.config import TrainConfig, flat, resolve
from mlm_scratch.util.errors import run_command
from mlm_scratch.util.runs import checkpoints, step_of

ROOT = Path(__file__).parents[2]
TIMEOUT = 300  # seconds; a limit that only ends a hang
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "train",
        "mlm_scratch.run.session",
        "matplotlib.pyplot",
        "transformers.models.roberta.modeling_roberta",
    ]
)


class Fork:
    """train.py in a forked process, on one core.

    Args:
        settings: a TrainConfig, or single flags.
        environment: variables that this process alone has.
        before: called in the process first.
        store: what it connects to; kept open as long as this object lives.
    """

    def __init__(
        self,
        *settings: Any,
        environment: dict[str, str] | None = None,
        before: Callable[[], object] | None = None,
        store: distributed.Store | None = None,
    ):
        self.store, self.output = store, tempfile.TemporaryDirectory()
        variables = dict(os.environ) | (environment or {})
        arguments = (_arguments(settings), variables, before, self.output.name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(
                "PYTHONPATH", str(ROOT), prepend=os.pathsep
            )  # for the process that is forked
            forkserver.ensure_running()
        self.process = FORKS.Process(target=_train, args=arguments)
        self.process.start()

    def is_alive(self) -> bool:
        """Whether it is still running."""
        return self.process.is_alive()

    def send_signal(self, number: int) -> None:
        """Send a signal to it."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def finish(self) -> tuple[int | None, str, str]:
        """Wait for its end; return exit code, standard output and standard error."""
        self.process.join(TIMEOUT)
        self.process.kill()
        out, err = (Path(self.output.name, name).read_text() for name in ("out", "err"))
        return self.process.exitcode, out, err


def _train(
    arguments: list[str],
    environment: dict[str, str],
    before: Callable[[], object] | None,
    output: str,
) -> None:
    import train

    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # as in a process that was not forked
    torch.set_num_threads(1)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(output, name), os.O_WRONLY | os.O_CREAT), stream)
    if before is not None:
        before()
    sys.argv = ["train.py", *arguments]
    sys.exit(run_command(train.main))


def forked(ranks: int, *settings: Any) -> list[Fork]:
    """Start that many ranks of train.py as forks, with the environment that torchrun sets."""
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RUN_ID": "forked",
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 does not start one
    }
    return [
        Fork(
            *settings,
            environment=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            store=store,
        )
        for rank in range(ranks)
    ]


def torchrun(ranks: int, *settings: Any, restarts: int = 0) -> subprocess.Popen[str]:
    """Start train.py by the real torchrun, one thread per rank."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(ranks), "--max-restarts", str(restarts)),
        *(str(ROOT / "train.py"), *_arguments(settings)),
    ]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_until(
    condition: Callable[[], object], started: subprocess.Popen[str] | list[Fork]
) -> None:
    """Wait until `condition` holds, while the processes run."""
    limit = time.monotonic() + TIMEOUT
    while not condition():
        if isinstance(started, list):
            alive = all(fork.is_alive() for fork in started)
        else:
            alive = started.poll() is None
        assert alive and time.monotonic() < limit, finish(started)
        time.sleep(0.02)


def finish(started: subprocess.Popen[str] | list[Fork]) -> tuple[int | None, str, str]:
    """Wait for all ranks; return the exit code (0 if all have 0), their output and errors."""
    if isinstance(started, list):
        codes, outs, errs = zip(*(fork.finish() for fork in started), strict=True)
        return next((code for code in codes if code != 0), 0), "".join(outs), "".join(errs)
    try:
        out, err = started.communicate(timeout=TIMEOUT)
        return started.returncode, out, err
    finally:
        started.kill()


def _arguments(settings: tuple[Any, ...]) -> list[str]:
    flags: list[Any] = []
    for given in settings:
        flags += flags_of(given) if isinstance(given, TrainConfig) else [given]
    return list(map(str, flags))


def flags_of(config: TrainConfig) -> Iterator[Any]:
    """Yield the flags of train.py that give `config`."""
    named = {"model": config.model.name, "train_file": config.text.train_file}
    implied = flat(resolve("tutorial", named))
    for name, value in flat(config).items():
        if name in named or value != implied[name]:
            yield "--" + name.replace("_", "-")
            if value is not True:
                yield from value if isinstance(value, tuple) else (value,)


def forget_after(step: int, run: Path) -> None:
    """Leave a run as a kill after this step would."""
    for checkpoint in checkpoints(run):
        if step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)
