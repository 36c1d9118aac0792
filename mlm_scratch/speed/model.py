"""A MaskedLM that is spared some work: a ready attention mask, packed rows, a loss in chunks.

A ready mask spares padded rows one wait for the GPU in each forward pass (counted by
tests/test_gpu_stand_in.py; its time is not measured). It is used where checks.py finds that it
gives the same logits. Packing and chunks: packing.py, cross_entropy.py. Off: build a MaskedLM.
"""

from torch import Tensor
from transformers import PreTrainedModel

from mlm_scratch.model import MaskedLM
from mlm_scratch.speed.cross_entropy import cross_entropy_sum
from mlm_scratch.speed.shapes import additive_mask, positions_in_texts


class FastMaskedLM(MaskedLM):
    """Computes the same as a MaskedLM, where the model can (checks.py tries it).

    Attributes:
        ready_mask: hand the model an attention mask that needs no more preparation.
        packs: rows may hold several texts (packing.py).
        first_position: what the model numbers the first token of a text.
    """

    def __init__(self, hf_model: PreTrainedModel):
        super().__init__(hf_model, cross_entropy_sum)
        self.ready_mask = self.packs = False
        self.first_position = 0

    def run(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Call the model with a ready mask and, if packed, position ids: as in MaskedLM."""
        if attention_mask is None or not (self.ready_mask or self.packs):
            return super().run(input_ids, attention_mask)
        inputs = {"attention_mask": additive_mask(attention_mask, self.packs)}
        if self.packs:
            inputs["position_ids"] = positions_in_texts(attention_mask) + self.first_position
        return self.hf_model(input_ids=input_ids, **inputs).logits
