"""The masked-LM loss, with the head on masked positions only.

An encoder turns (B, T) ids into (B, T, H) hidden states; the LM head turns each hidden state into V
scores, one per vocabulary entry. Only the masked positions have a label, about 15 %, so only there
the head has to run: with V = 50,265 it is nearly half of all arithmetic of a distilroberta step.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from mlm_scratch.masking import IGNORE


class MaskedLM(nn.Module):
    """A *ForMaskedLM model whose head runs on chosen positions only.

    Nearly every such model is an encoder and a head that treats each position by itself (probe.py
    tries whether this one is). A hook on the encoder's output keeps the hidden states at the chosen
    positions, (B, T, H) -> (1, N, H), and the model's own head, whatever it is called, sees one row
    of N instead of B rows of T.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.positions: Tensor | None = None  # (N,), set during a forward pass
        self.hook = model.base_model.register_forward_hook(self._keep_positions)
        self.train(model.training)  # a new module starts in train mode

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor | None
    ) -> Tensor:
        """The logits at `positions`, (N,) indices into the flattened batch: (N, V).

        With positions None the head runs everywhere: (B * T, V).
        """
        self.positions = positions
        try:
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        finally:
            self.positions = None
        return logits.flatten(0, 1)  # (1, N, V) or (B, T, V) -> (N, V) or (B * T, V)

    def _keep_positions(self, encoder: nn.Module, inputs: tuple, output: Any) -> Any:
        if self.positions is not None:
            hidden = output["last_hidden_state"].flatten(0, 1)  # (B * T, H)
            output["last_hidden_state"] = hidden[self.positions].unsqueeze(0)  # (1, N, H)
        return output


def masked_lm_loss(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    *,
    positions: Tensor | None = None,
    dense: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropy over the masked tokens of a batch, and their number.

    Args:
        model: a MaskedLM (also in DistributedDataParallel), or the AutoModelForMaskedLM to put into
            one for this call.
        input_ids, attention_mask: (B, T); a mask of None: nothing is padded.
        labels: (B, T), the id to predict, -100 where there is none.
        positions: (N,) indices in the flattened batch of all masked tokens, if known; more do no
            harm. Looking for them in labels on a GPU makes the CPU wait.
        dense: run the head on all B * T positions, as the reference does.

    Returns:
        (loss_sum, n_masked), two scalar tensors: nats, and tokens. A sum, so that batches can be
        added up and divided once by the number of tokens in all of them.

    Source: the loss of transformers' *ForMaskedLM models, which is this sum over this number.
    """
    if isinstance(model, PreTrainedModel):
        wrapped = MaskedLM(model)
        try:
            return masked_lm_loss(
                wrapped, input_ids, attention_mask, labels, positions=positions, dense=dense
            )
        finally:
            wrapped.hook.remove()
    logits, labels = masked_lm_logits(model, input_ids, attention_mask, labels, positions, dense)
    # In fp32 under autocast too: a sum over 50,265 exponentials does not fit half precision.
    loss_sum = cross_entropy(logits.float(), labels, reduction="sum", ignore_index=IGNORE)
    return loss_sum, (labels != IGNORE).sum()


def masked_lm_logits(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    positions: Tensor | None,
    dense: bool,
) -> tuple[Tensor, Tensor]:
    """What a MaskedLM thinks of the masked tokens, and what they are; arguments as above.

    Returns:
        (logits, labels), (N, V) and (N,); with `dense` N is B * T, and labels has its -100.
    """
    labels = labels.flatten()  # (B * T,)
    if dense:
        return model(input_ids, attention_mask, None), labels  # (B * T, V), (B * T,)
    if positions is None:
        positions = (labels != IGNORE).nonzero().squeeze(1)  # (N,)
    return model(input_ids, attention_mask, positions), labels[positions]  # (N, V), (N,)
