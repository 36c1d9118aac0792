"""The masked-LM loss, and the head on masked positions only ("sparse prediction").

The plain loss takes two lines:

    logits = model(input_ids, attention_mask).logits  # (B, T, V)
    loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)

The LM head turns each hidden state, H numbers, into V logits, one per token of the vocabulary. Here
it does so at all B * T positions, though only the N masked ones, about 15 %, have a label. With
V = 50,265 the head is nearly half of all arithmetic in a distilroberta step. On masked positions
only, given as indices into the flattened batch, the loss is the same up to rounding:

    hidden = encoder(input_ids, attention_mask)  # (B, T, H)
    logits = head(hidden.flatten(0, 1)[positions])  # (N, V)
    loss = cross_entropy(logits, labels.flatten()[positions])
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from .loader import Batch
from .masking import IGNORE


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum the cross-entropy over the rows that have a label: (N, V), (N,) -> () in nats."""
    # In fp32: half precision has too few digits for a sum of V exponentials.
    return cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")


class MaskedLM(nn.Module):
    """A *ForMaskedLM model of transformers whose head runs on masked positions only.

    Nearly every such model is an encoder and a head that treats each position by itself. A hook on
    the encoder gathers the hidden states at the masked positions, (B, T, H) -> (1, N, H), and the
    model's own head, whatever it is called, sees one row of N positions instead of B rows of T.

    Args:
        hf_model: an encoder with an LM head. Shares its weights with the wrapper.
        loss: (N, V) logits and (N,) labels, -100 where there is none -> (), a sum.

    Attributes:
        dense_head: run the head on all positions, as Trainer does; for a head that mixes them.
    """

    def __init__(
        self,
        hf_model: PreTrainedModel,
        loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy_sum,
    ):
        super().__init__()
        self.hf_model, self.loss = hf_model, loss
        self.dense_head = False
        self.positions: Tensor | None = None  # (N,), set during a forward pass
        self.hook = hf_model.base_model.register_forward_hook(self._keep_positions)
        self.train(hf_model.training)  # a new module starts in train mode

    def gather_after(self, module: nn.Module) -> None:
        """Gather the hidden states that `module` returns, (B, T, H), instead of the encoder's.

        Only attention mixes positions: after it, the last layer can do without the others, too.
        speed/checks.py finds the module.
        """
        self.hook.remove()
        self.hook = module.register_forward_hook(self._keep_positions)

    def forward(self, batch: Batch) -> Tensor:
        """Sum the cross-entropy over the masked tokens of a batch: () in nats.

        A sum, so that the batches of a step can be added up and divided once, by the number of
        masked tokens in all of them.

        Source: the loss of transformers' *ForMaskedLM models is this sum divided by that number.
        """
        logits, labels = self.masked_logits(batch)  # (N, V), (N,)
        return self.loss(logits, labels)  # ()

    def masked_logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute the logits at the masked positions, (N, V), and their labels, (N,).

        With the dense head N is B * T, and most labels are -100.
        """
        labels = batch.labels.flatten()  # (B * T,)
        positions = None if self.dense_head else batch.positions  # (N,)
        logits = self.logits(batch.input_ids, batch.attention_mask, positions)  # (N, V)
        return logits, labels if positions is None else labels[positions]

    def logits(
        self, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor | None
    ) -> Tensor:
        """Run the model: (B, T) inputs -> (N, V) at these flat positions (None: at all)."""
        self.positions = positions
        try:
            logits = self.run(input_ids, attention_mask)
        finally:
            self.positions = None
        return logits.flatten(0, 1)  # (1, N, V) or (B, T, V) -> (N, V) or (B * T, V)

    def run(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Call the model: (B, T) inputs -> logits, (B, T, V), or (1, N, V) if the hook gathers."""
        return self.hf_model(input_ids=input_ids, attention_mask=attention_mask).logits

    def _keep_positions(self, module: nn.Module, inputs: tuple, output: Any) -> Any:
        """Gather the hidden states at the masked positions: (B, T, H) -> (1, N, H)."""
        if self.positions is None:
            return output
        hidden = output if isinstance(output, Tensor) else output["last_hidden_state"]  # (B, T, H)
        hidden = hidden.flatten(0, 1)[self.positions].unsqueeze(0)  # (1, N, H)
        if isinstance(output, Tensor):
            return hidden
        output["last_hidden_state"] = hidden
        return output
