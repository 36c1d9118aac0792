"""The first row of a run, as the model sees it: three lines printed before training."""

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from mlm_scratch.config import TrainConfig
from mlm_scratch.data.rows import Source
from mlm_scratch.hf.encode import visible_token
from mlm_scratch.loader import Collator
from mlm_scratch.masking import IGNORE
from mlm_scratch.util.tables import aligned

MAX_TOKENS = 12


def first_row_lines(
    source: Source, rows_per_step: int, tokenizer: PreTrainedTokenizerBase, config: TrainConfig
) -> Iterator[str]:
    """Yield the first row of the first step that has a masked token near its start.

    Three lines: its tokens, what the model sees, and the labels; none for a stream. The masks come
    from a separate generator, so that the run itself does not change.
    """
    seed = config.optimization.seed
    if (first := source.first_rows(rows_per_step, seed)) is None:
        return
    rows, order = first
    batch = Collator(tokenizer, **config.masking.of_collator(), seed=seed)(rows, order)
    is_masked = (batch.labels[:, :MAX_TOKENS] != IGNORE).any(dim=1)  # (B,)
    number = int(is_masked.int().argmax())  # 0 if there is none
    start, end = rows.starts[order[number]], rows.starts[order[number] + 1]
    ids = rows.tokens[start:end][:MAX_TOKENS].tolist()
    seen_ids, labels = batch.input_ids[number].tolist(), batch.labels[number].tolist()
    table = [
        [title, *("·" if id == IGNORE else visible_token(id, tokenizer) for id in row[: len(ids)])]
        for title, row in (("token ", ids), ("model sees ", seen_ids), ("label ", labels))
    ]
    yield f"row {number} of the first step, {len(ids)} of its {end - start} tokens:"
    yield from (f"  {line}" for line in aligned(table, gap=" "))
