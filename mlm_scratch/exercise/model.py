"""Exercise 3: the masked-LM loss, and the same from masked positions only."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mlm_scratch.exercise.judging import Exercise, Wrong, close, equal

START = '''"""Exercise 3: the loss, and the head on masked positions only. Judge it with:

python -m mlm_scratch.exercise model my_model.py
"""

from collections.abc import Callable

import torch
from torch import Tensor


def masked_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy over the masked tokens, () in nats.

    Args:
        logits: (B, T, V), perhaps of half precision.
        labels: (B, T) int64, the id to predict, -100 where there is none.
    """
    # -ln p of the label, p by softmax over V. Computed in fp32: a sum of V exponentials.
    raise NotImplementedError


def sparse_loss(hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor) -> Tensor:
    """Return the same loss, but run the head on the masked positions only.

    Args:
        hidden: (B, T, H) hidden states.
        head: (..., H) -> (..., V).
        labels: (B, T) int64, -100 where there is none.
    """
    # Flatten the batch, keep the N rows that have a label, and only then call the head.
    raise NotImplementedError
'''

B, T, H, V = 3, 6, 4, 7


class _Chapter:
    """The chapter's two formulas, as its first lines have them."""

    @staticmethod
    def masked_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
        """Take the mean over the labels, in fp32."""
        return cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)

    @staticmethod
    def sparse_loss(hidden: Tensor, head: Any, labels: Tensor) -> Tensor:
        """Gather first."""
        positions = (labels.flatten() != -100).nonzero().squeeze(1)  # (N,)
        logits = head(hidden.flatten(0, 1)[positions])  # (N, V)
        return cross_entropy(logits.float(), labels.flatten()[positions])


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return (B, T, V) logits and (B, T) labels: 1, 3 and 0 of them in the rows."""
    logits = 3 * torch.randn(B, T, V, generator=torch.Generator().manual_seed(seed))
    labels = torch.full((B, T), -100)
    labels[0, 2] = 5
    labels[1, [0, 3, 4]] = torch.tensor([0, 6, 2])
    return logits, labels


def loss_of(solution: Any, logits: Tensor, labels: Tensor) -> Tensor:
    """Call masked_lm_loss; check that a single number comes back."""
    loss = solution.masked_lm_loss(logits, labels)
    if not isinstance(loss, Tensor):
        raise Wrong("a tensor", type(loss).__name__)
    equal("the shape of the loss", tuple(loss.shape), ())
    return loss


class Head(torch.nn.Module):
    """A linear head that notes how many positions it is called on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(H, V)
        self.positions: list[int] = []

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V)."""
        self.positions.append(hidden.numel() // H)
        return self.linear(hidden)


EXERCISE = Exercise(
    task="masked_lm_loss and sparse_loss: the loss, with the head on all positions or some",
    lines=6,
    judged="by torch's cross_entropy, value and gradient",
    defines=("masked_lm_loss", "sparse_loss"),
    start=START,
    twin=lambda solution: all(
        torch.equal(loss_of(solution, *batch(s)), loss_of(_Chapter, *batch(s))) for s in range(3)
    ),
    timed=lambda solution: solution.masked_lm_loss(
        torch.ones(8, 128, 1000), torch.zeros(8, 128, dtype=torch.int64)
    ),
    chapter=_Chapter,
)


@EXERCISE.check("the loss is that of cross_entropy", "-ln of the softmax at the label")
def value(solution: Any) -> None:
    """Of a batch where every token has a label."""
    logits, _ = batch()
    labels = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
    close("loss", loss_of(solution, logits, labels), _Chapter.masked_lm_loss(logits, labels))


@EXERCISE.check("tokens without a label do not count", "-100 is no id: it has no logit")
def ignored(solution: Any) -> None:
    """Their logits may be anything, NaN aside."""
    logits, labels = batch()
    before = loss_of(solution, logits, labels)
    logits[labels == -100] = 3 * torch.randn(V)
    close("loss with other logits where no label is", loss_of(solution, logits, labels), before)


@EXERCISE.check(
    "the mean is over masked tokens, not over rows or all tokens", "divide by the number of labels"
)
def mean_over_tokens(solution: Any) -> None:
    """The rows have 1, 3 and 0 labels."""
    logits, labels = batch()
    each = [
        -logits[row, at].log_softmax(dim=-1)[labels[row, at]].item()
        for row, at in (labels != -100).nonzero().tolist()
    ]
    close("loss", loss_of(solution, logits, labels), sum(each) / len(each))


@EXERCISE.check(
    "large logits do not overflow",
    "exp(1000) is infinite, but a softmax only depends on differences",
)
def large(solution: Any) -> None:
    """Of 1,000: exp of that is infinite."""
    logits, labels = batch()
    logits = 1000 * logits
    close("loss", loss_of(solution, logits, labels), _Chapter.masked_lm_loss(logits, labels))


@EXERCISE.check("half-precision logits are summed in fp32", "bf16 has 8 bits: too few for V terms")
def half(solution: Any) -> None:
    """4,096 equal logits: ln 4096."""
    for dtype in (torch.bfloat16, torch.float16):
        logits = torch.zeros(1, 2, 4096, dtype=dtype)
        logits[0, :, 1] = 1.0
        labels = torch.tensor([[1, -100]])
        expected = _Chapter.masked_lm_loss(logits, labels)
        close(f"loss of {dtype}", loss_of(solution, logits, labels), expected, 1e-4)


@EXERCISE.check("the gradient is that of cross_entropy", "no detach, no item on the way")
def gradient(solution: Any) -> None:
    """Element by element."""
    logits, labels = batch()
    grads = []
    for each in (solution, _Chapter):
        leaf = logits.clone().requires_grad_()
        loss = each.masked_lm_loss(leaf, labels)
        if not loss.requires_grad:
            raise Wrong("a loss with a gradient", "one without: cut off from the logits")
        grads.append(torch.autograd.grad(loss, leaf)[0])
    close("largest difference of the gradients", (grads[0] - grads[1]).abs().max(), 0.0)


def sparse(solution: Any, seed: int = 0) -> tuple[Tensor, Head, Tensor, Tensor]:
    """Call sparse_loss; return its loss, the head, hidden states and labels."""
    torch.manual_seed(seed)
    head, (_, labels) = Head(), batch()
    hidden = torch.randn(B, T, H, requires_grad=True)
    loss = solution.sparse_loss(hidden, head, labels)
    if not isinstance(loss, Tensor):
        raise Wrong("a tensor", type(loss).__name__)
    equal("the shape of the loss", tuple(loss.shape), ())
    return loss, head, hidden, labels


@EXERCISE.check(
    "on masked positions only, the loss is the same", "gather hidden states and labels alike"
)
def sparse_value(solution: Any) -> None:
    """Beside the dense way."""
    loss, head, hidden, labels = sparse(solution)
    close("loss", loss.detach(), _Chapter.masked_lm_loss(head(hidden), labels).detach())
    half = torch.zeros(1, 2, 4096, dtype=torch.bfloat16)
    half[0, 0, 1] = 1.0
    of_half = solution.sparse_loss(half, lambda states: states, torch.tensor([[1, -100]]))
    expected = _Chapter.masked_lm_loss(half, torch.tensor([[1, -100]]))
    close("loss of bf16 logits", of_half, expected, 1e-4)


@EXERCISE.check("the head sees masked positions only", "gather before the head, not after it")
def sparse_positions(solution: Any) -> None:
    """4 of the 18."""
    _, head, _, labels = sparse(solution)
    equal("positions that the head saw", sum(head.positions), int((labels != -100).sum()))


@EXERCISE.check("its gradients are the same, too", "of the head's weights and of hidden")
def sparse_gradient(solution: Any) -> None:
    """Of both."""
    loss, head, hidden, labels = sparse(solution)
    if not loss.requires_grad:
        raise Wrong("a loss with a gradient", "one without: cut off from hidden")
    leaves = hidden, head.linear.weight
    came = torch.autograd.grad(loss, leaves)
    expected = torch.autograd.grad(_Chapter.masked_lm_loss(head(hidden), labels), leaves)
    for name, one, other in zip(("hidden", "the head"), came, expected, strict=True):
        close(f"largest difference of the gradients of {name}", (one - other).abs().max(), 0.0)
