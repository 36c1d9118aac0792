"""Several processes, one run: the ranks, and everything they have to agree on.

    torchrun --nproc-per-node 4 train.py --epochs 2

Every rank has the whole model and computes its share of every step. DistributedDataParallel (DDP)
all-reduces the gradients; all other communication goes through a `Ranks` object. A single process
has such an object, too, whose methods are trivial.
"""

import functools
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from mlm_scratch.util.errors import UserError, first_line
from mlm_scratch.util.launch import Launch, this_launch


@dataclass(frozen=True)
class Ranks(Launch):
    """The ranks of this run as one rank sees them, and the communication between them.

    All ranks must call every method at the same point of the run, or they hang.

    Attributes:
        store: keys and values that all ranks see.
        name: a unique name of this launch; its restarts keep the name.
    """

    store: distributed.Store = field(default_factory=distributed.HashStore)
    name: str = ""

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over all ranks. On a GPU, the CPU does not wait."""
        if self.size > 1:
            distributed.all_reduce(tensor, group=_group_for(tensor.device))

    def all_reduce_max(self, number: int) -> int:
        """Return the maximum of `number` over all ranks, without touching a GPU."""
        if self.size == 1:
            return number
        value = torch.tensor(number)  # ()
        distributed.all_reduce(value, distributed.ReduceOp.MAX)
        return int(value)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in order of rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def rank0_decides(self, decide: Callable[[], Any]) -> Any:
        """Call `decide` on rank 0 alone; all return its result, or exit if it raises UserError."""
        decision = None
        try:
            decision = decide() if self.is_first else None
        except UserError as error:
            self.gather(error)
            raise
        decision = self.gather(decision)[0]
        if isinstance(decision, UserError):
            sys.exit(2)  # rank 0 prints it
        return decision

    @contextmanager
    def rank0_first(self) -> Iterator[None]:
        """Let the first rank of each node go first; the others find its files in the cache.

        All ranks wait for each other at the end. They poll the store, because a collective would
        time out after many minutes and would not react to signals.
        """
        node = f"node {self.node}"
        if self.local_rank > 0:
            self._wait_for([node])
        yield
        for key in (node, f"rank {self.rank}"):
            self.store.set(key, "prepared")
        self._wait_for([f"rank {rank}" for rank in range(self.size)])

    def _wait_for(self, keys: list[str]) -> None:
        while not self.store.check(keys):
            time.sleep(0.1)

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Return `model`, on `device`, such that backward sums its gradients over all ranks.

        DDP would average them. But a step's loss is already divided by the masked tokens of all
        ranks, so that the sum is the gradient of the whole step.
        """
        if self.size == 1:
            return model
        ddp_model = DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            process_group=_group_for(device),
            gradient_as_bucket_view=True,  # no second copy of the gradients
        )
        ddp_model.register_comm_hook(None, _sum_gradients)
        return ddp_model


def _group_for(device: torch.device) -> distributed.ProcessGroup | None:
    """Return the process group for tensors on this device: NCCL for CUDA, else None for gloo."""
    return _nccl_group() if device.type == "cuda" else None


@functools.cache
def _nccl_group() -> distributed.ProcessGroup:
    """Start NCCL, which a process must not do before it forks the workers of a stream."""
    group = distributed.new_group(backend="nccl")
    _GROUPS.append(group)
    return group


def _sum_gradients(
    state: None, bucket: distributed.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    gradients = bucket.buffer()
    work = distributed.all_reduce(gradients, group=_group_for(gradients.device), async_op=True)
    assert work is not None, "an asynchronous collective always has one"
    return work.get_future().then(lambda summed: summed.value()[0])


ALONE = Ranks()

# Releasing the last reference to a process group waits for its threads. DDP does that while it
# holds Python's GIL, which one of those threads may need to finish: a deadlock. So this list holds
# a reference until Python exits.
_GROUPS: list[distributed.ProcessGroup | None] = []


@contextmanager
def all_ranks() -> Iterator[Ranks]:
    """Join the other ranks that torchrun has started.

    Raises:
        UserError: the other ranks cannot be reached, or one of them dies.
    """
    launch = this_launch()
    if launch.size == 1 and not launch.by_torchrun:
        yield ALONE
        return
    try:
        store, _, _ = next(distributed.rendezvous("env://"))
        name = store.compare_set("launch", "", uuid.uuid4().hex).decode()
        # After a restart the same store still holds the addresses of the dead ranks, so each
        # attempt has its own prefix.
        store = distributed.PrefixStore(f"attempt {launch.restarts}", store)
        distributed.init_process_group(
            "gloo", store=store, rank=launch.rank, world_size=launch.size
        )
        _GROUPS.append(distributed.group.WORLD)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot reach the other processes: {first_line(error)}") from error
    try:
        yield Ranks(**asdict(launch), store=store, name=name)
    except SystemExit:  # after a stop signal: all ranks end here
        distributed.destroy_process_group()
        raise
    except RuntimeError as error:
        if not any(name in str(error).lower() for name in ("gloo", "nccl", "tcpstore")):
            raise
        raise UserError(
            "another process of this run is gone or out of reach, so this one stops too; --resume "
            f"goes on from the last checkpoint ({first_line(error)})"
        ) from error
    distributed.destroy_process_group()
