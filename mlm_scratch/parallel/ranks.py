"""Several processes, one run: what they tell each other.

    torchrun --nproc-per-node 4 train.py --epochs 2

Every process ("rank") has the whole model and does its share of every step. Their gradients are
exchanged by DistributedDataParallel; all else that has to be agreed on goes through a Ranks. A
process alone has one too, in which every method is the simple case.
"""

import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from mlm_scratch.util.errors import UserError
from mlm_scratch.util.launch import Launch, this_launch


@dataclass(frozen=True)
class Ranks:
    """The processes of this run, as one of them sees them.

    Every method is called by all of them, at the same point of the run, or all wait for ever.
    """

    launch: Launch
    # Keys and values that all processes see
    store: distributed.Store = field(default_factory=distributed.HashStore)
    name: str = ""  # of this launch and all its restarts, and of no other

    @property
    def rank(self) -> int:
        """The number of this process: 0 ... size - 1."""
        return self.launch.rank

    @property
    def size(self) -> int:
        """How many there are."""
        return self.launch.size

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that prints and writes."""
        return self.launch.is_first

    def add_up(self, tensor: Tensor) -> Tensor:
        """Put the sum over all processes in the place of `tensor`. For one on a GPU, the CPU does
        not wait."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def largest(self, number: int) -> int:
        """The largest of the numbers that the processes have. Goes from CPU to CPU."""
        if self.size == 1:
            return number
        value = torch.tensor(number)  # ()
        distributed.all_reduce(value, distributed.ReduceOp.MAX)
        return int(value)

    def gather(self, value: Any) -> list[Any]:
        """What every process has, in the order of their numbers."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def first_decides(self, decide: Callable[[], Any]) -> Any:
        """Call `decide` in the first process only; all return what it returned. Where it raises
        UserError the others exit without a word."""
        decision = None
        try:
            decision = decide() if self.is_first else None
        except UserError as error:
            self.gather(error)
            raise
        decision = self.gather(decision)[0]
        if isinstance(decision, UserError):
            sys.exit(2)
        return decision

    @contextmanager
    def one_after_another(self) -> Iterator[None]:
        """The first process of each machine goes first; the others find its files in the cache. At
        the end all wait for each other.

        Not a collective: one that lasts for ten minutes counts as failed, and it hears no signal.
        """
        machine = f"machine {self.launch.machine}"
        if self.launch.local_rank > 0:
            self._wait_for([machine])
        yield
        for key in (machine, f"rank {self.rank}"):
            self.store.set(key, "prepared")
        self._wait_for([f"rank {rank}" for rank in range(self.size)])

    def _wait_for(self, keys: list[str]) -> None:
        while not self.store.check(keys):
            time.sleep(0.1)

    def wrap(self, net: nn.Module) -> nn.Module:
        """`net` with its gradients averaged over the processes in backward."""
        return net if self.size == 1 else DistributedDataParallel(net)

    def exchange_gradients(self, net: nn.Module, now: bool) -> AbstractContextManager:
        """For a forward pass of the wrapped `net`: whether its backward averages the gradients, and
        with them those that were only added up in this process before."""
        if now or not isinstance(net, DistributedDataParallel):
            return nullcontext()
        return net.no_sync()


ALONE = Ranks(Launch())

# Whoever lets go of a process group last waits for its threads. DistributedDataParallel does that
# without giving away Python's lock, which a thread may need to finish: then both wait for ever. So
# the last one is this list, when Python ends.
_GROUPS: list[distributed.ProcessGroup | None] = []


@contextmanager
def all_ranks() -> Iterator[Ranks]:
    """Meet the other processes that torchrun has started.

    Raises UserError where that fails, or where one of them is gone.
    """
    launch = this_launch()
    if launch.size == 1 and not launch.by_torchrun:
        yield ALONE
        return
    try:
        store, _, _ = next(distributed.rendezvous("env://"))
        name = store.compare_set("launch", "", uuid.uuid4().hex).decode()
        # A restart finds the addresses of the processes before it in the same store, unless each
        # attempt has names of its own.
        store = distributed.PrefixStore(f"attempt {launch.restarts}", store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(
            backend, store=store, rank=launch.rank, world_size=launch.size
        )
        _GROUPS.append(distributed.group.WORLD)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot meet the other processes: {_first_line(error)}") from error
    try:
        yield Ranks(launch, store, name)
    except SystemExit:  # all processes stop here, as a signal asked them to
        distributed.destroy_process_group()
        raise
    except RuntimeError as error:
        if not any(name in str(error).lower() for name in ("gloo", "nccl", "tcpstore")):
            raise
        raise UserError(
            "another process of this run is gone or out of reach, so this one ends too; --resume "
            f"goes on from the last checkpoint ({_first_line(error)})"
        ) from error
    distributed.destroy_process_group()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
