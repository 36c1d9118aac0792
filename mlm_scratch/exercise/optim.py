"""Exercise 4: parameter groups, and the linear schedule."""

from typing import Any

import torch
from torch import nn

from mlm_scratch import optim
from mlm_scratch.exercise.judging import Exercise, Wrong, close, drawn, equal

START = '''"""Exercise 4: what weight decay spares, and the learning rate of a step. Judge it with:

python -m mlm_scratch.exercise optim my_optim.py
"""

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Split the parameters into groups for AdamW: {"params": [...], "weight_decay": ...} each.

    Weight matrices and embeddings decay; biases and the parameters of norms do not.
    """
    # A norm is known by its class, nn.LayerNorm, or by its name. Shared weights come once.
    raise NotImplementedError


def linear(step: int, total_steps: int, warmup_steps: int) -> float:
    """Return the learning rate of a step as a share of the peak: 0 to 1.

    Up from 0 in the warm-up, in a straight line, then down to 0 at total_steps.
    """
    # Step 0 of a warm-up has a rate of 0; without a warm-up it has the peak.
    raise NotImplementedError
'''


class _Chapter:
    """The chapter has all schedules in one function."""

    parameter_groups = staticmethod(optim.parameter_groups)

    @staticmethod
    def linear(step: int, total_steps: int, warmup_steps: int) -> float:
        """Return that of the schedule "linear"."""
        return optim.share_of_peak(step, total_steps, "linear", warmup_steps)


class Layer(nn.Module):
    """A layer with a norm whose name says nothing, and one whose class says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 6)
        self.ln_f = nn.LayerNorm(6)
        self.attention_norm = nn.RMSNorm(6)
        self.normalize_scores = nn.Linear(6, 4, bias=False)


class Model(nn.Module):
    """Embeddings, layers, and a decoder that shares its weight with the embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(9, 4)
        self.LayerNorm = nn.LayerNorm(4)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.decoder = nn.Linear(4, 9)
        self.decoder.weight = self.word_embeddings.weight


def decay_of(solution: Any, weight_decay: float = 0.1) -> dict[str, float]:
    """Call parameter_groups; return the decay of each parameter by its name."""
    model = Model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups, found = solution.parameter_groups(model, weight_decay), {}
    for group in groups:
        if not isinstance(group, dict) or not {"params", "weight_decay"} <= group.keys():
            raise Wrong('groups with "params" and "weight_decay"', f"{group!r:.60}")
        for parameter in group["params"]:
            if not isinstance(parameter, nn.Parameter):
                raise Wrong("parameters in a group", type(parameter).__name__)
            name = names[id(parameter)]
            if name in found:
                raise Wrong("each parameter once", f"{name} twice")
            found[name] = group["weight_decay"]
    missing = names.values() - found.keys()
    equal("parameters that are in no group", sorted(missing), [])
    return found


EXERCISE = Exercise(
    task="parameter_groups and linear: what decays, and how fast each step learns",
    lines=12,
    judged="parameter by parameter of a small model, and step by step",
    defines=("parameter_groups", "linear"),
    start=START,
    twin=lambda solution: all(
        solution.linear(step, 97, 13) == _Chapter.linear(step, 97, 13) for step in range(98)
    ),
    timed=lambda solution: solution.parameter_groups(Model(), 0.1),
    chapter=_Chapter,
)


def has_decay(solution: Any, wanted: float, *endings: str) -> None:
    """Raise Wrong unless the parameters with these endings have this decay."""
    for weight_decay in (0.1, 0.02):
        for name, decay in decay_of(solution, weight_decay).items():
            if name.endswith(endings):
                equal(f"weight decay of {name}", decay, weight_decay if wanted else 0.0)


@EXERCISE.check(
    "each parameter is in one group, shared ones once", "named_parameters lists a shared one once"
)
def complete(solution: Any) -> None:
    """None is missing, none is there twice; AdamW takes the groups."""
    decay_of(solution)
    torch.optim.AdamW(solution.parameter_groups(Model(), 0.1))


@EXERCISE.check("weight matrices and embeddings decay", "a part of a name can mislead")
def matrices(solution: Any) -> None:
    """Also one that has "normalize" in its name, without being a norm."""
    endings = ("embeddings.weight", "dense.weight", "normalize_scores.weight")
    has_decay(solution, 0.1, *endings)


@EXERCISE.check("biases do not decay", "their size says nothing of how complex a function is")
def biases(solution: Any) -> None:
    """Of layers and of the decoder."""
    has_decay(solution, 0.0, "dense.bias", "decoder.bias")


@EXERCISE.check("norms do not decay, whatever their name", "a name may say nothing: ln_f")
def norms(solution: Any) -> None:
    """One is called ln_f."""
    has_decay(solution, 0.0, "LayerNorm.weight", "LayerNorm.bias", "ln_f.weight", "ln_f.bias")


@EXERCISE.check(
    "nor do norms of other classes that are called so", "RMSNorm is no LayerNorm: its name tells"
)
def named_norms(solution: Any) -> None:
    """A part of the name: attention_norm."""
    has_decay(solution, 0.0, "attention_norm.weight")


def rates(solution: Any, total: int, warmup: int) -> None:
    """Compare all steps of a schedule; and its end, if the warm-up is over by then."""
    steps = list(range(total + (warmup < total)))
    came = [solution.linear(step, total, warmup) for step in steps]
    expected = [_Chapter.linear(step, total, warmup) for step in steps]
    for step in steps:
        if not abs(came[step] - expected[step]) <= 1e-9:
            at = max(0, step - 4)
            rows: dict[str, list[Any]] = {"step": steps, "expected": expected, "came": came}
            shown = {
                name: [f"{value:.3g}" for value in values[at : at + 10]]
                for name, values in rows.items()
            }
            what = f"share at step {step} of {total}, warm-up {warmup}: {expected[step]:.4g}"
            raise Wrong(what, f"{came[step]:.4g}", drawn(shown))


@EXERCISE.check(
    "without a warm-up the rate falls from 1 to 0", "a straight line to 0 at total_steps"
)
def falls(solution: Any) -> None:
    """Of several lengths."""
    for total in (1, 2, 10):
        rates(solution, total, 0)


@EXERCISE.check(
    "a warm-up rises from 0, one step after the other",
    "the first step of a warm-up does not learn yet",
)
def rises(solution: Any) -> None:
    """Up to the peak at its end."""
    came = [solution.linear(step, 20, 5) for step in range(6)]
    for step, share in enumerate(came):
        close(f"share at step {step} of a warm-up of 5", share, step / 5, 1e-9)


@EXERCISE.check(
    "after the warm-up it falls to 0 over the steps that are left",
    "the line down begins where the warm-up ends",
)
def rises_and_falls(solution: Any) -> None:
    """Of several shapes."""
    for total, warmup in ((10, 4), (10, 1), (7, 6), (100, 30)):
        rates(solution, total, warmup)


@EXERCISE.check(
    "a warm-up as long as the run, or longer, divides by no zero", "no step is left to fall over"
)
def borders(solution: Any) -> None:
    """And the step after the last, which a scheduler asks for."""
    for total, warmup in ((5, 5), (5, 8)):
        rates(solution, total, warmup)
    close("share at step 5 of 5, warm-up 5", solution.linear(5, 5, 5), 0.0)
    close("share at step 12 of 10", solution.linear(12, 10, 2), 0.0)
