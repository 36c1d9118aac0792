"""torch.compile, with the arguments that fit the shapes of a run. Off unless --compile.

On an H200, distilroberta's shape in bf16: a step of 8 x 128 is 3.2 x as fast, one of 256 x 128
1.2 x (tests/README.md).
"""

from typing import Any

from mlm_scratch.config import TrainConfig
from mlm_scratch.parallel.ranks import Ranks
from mlm_scratch.precision import Precision


def compile_options(config: TrainConfig, precision: Precision, ranks: Ranks) -> dict[str, Any]:
    """Return the arguments of torch.compile for the shapes that this run has.

    Blocks have the same shape in every step but the last of an epoch, so each of the two gets a
    graph of its own, without symbolic sizes. A GPU can then even replay a recorded step (CUDA
    graphs), but not while gradients are accumulated, nor under DDP (pytorch/pytorch#113809).
    """
    if config.text.grouping != "blocks":
        return {"dynamic": True}
    one_batch = config.optimization.accumulate == 1 and ranks.size == 1
    can_replay = one_batch and precision.device.type == "cuda"
    return {"dynamic": False, "mode": "reduce-overhead" if can_replay else "default"}
