"""What infer.py prints: fills and their steps, joint fills, scores, or the pipeline's JSON."""

import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlm_scratch.fill_mask import fill_in, predict
from mlm_scratch.hf.checks import ignores_padding, longest_input
from mlm_scratch.hf.encode import encode, find_masks, find_words, refusals_reported, spell_target
from mlm_scratch.inference.fill import fill_mask
from mlm_scratch.inference.joint import ORDERS, fill_jointly
from mlm_scratch.inference.score import score_sentence
from mlm_scratch.util.errors import UserError
from mlm_scratch.util.progress import progress_bar

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and newlines
BATCH_SIZE = 8
BAR_WIDTH = 20


@dataclass
class Output:
    """Prints one kind of predictions of a model, with the options of infer.py.

    Attributes:
        model: a masked-LM in eval mode.
        tokenizer: its tokenizer.
        kind: "fills", "joint", "score" or "json".
        top_k: fills per mask.
        targets: consider only these tokens.
        truncate: truncate texts that are too long.
        score_method: which other tokens are masked together with the scored token.
        with_steps: also print the steps that lead to the fills.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    kind: str
    top_k: int
    targets: list[str] | None
    truncate: bool
    score_method: str
    with_steps: bool

    def check(self, texts: list[str]) -> None:
        """Raise UserError for the first text that cannot be filled or scored."""
        find = find_words if self.kind == "score" else find_masks
        for number, text in enumerate(texts, start=1):
            try:
                find(self.tokenizer, self._ids(text), text)
            except UserError as error:
                which = f"text {number}: " if len(texts) > 1 else ""
                raise UserError(f"{which}{error}") from error

    def show(self, texts: list[str]) -> None:
        """Print the output for each text, BATCH_SIZE at a time, with a bar if there are many."""
        if self.kind == "json":
            print(self.as_json(texts))
            return
        lines_of = {"fills": self.fills, "joint": self.joint, "score": self.scores}[self.kind]
        # Targets may be spelled differently in each text; the other kinds batch by themselves.
        one_by_one = len(texts) == 1 or self.targets or self.kind != "fills"
        size = 1 if one_by_one or not ignores_padding(self.model, self.tokenizer) else BATCH_SIZE
        no_bar = len(texts) <= size
        with progress_bar(total=len(texts), unit=" texts", leave=False, disable=no_bar) as bar:
            for start in range(0, len(texts), size):
                batch = texts[start : start + size]
                lines = [harmless(line) for line in lines_of(batch)]
                with bar.external_write_mode():
                    print(*lines, sep="\n")
                bar.update(len(batch))

    def as_json(self, texts: list[str]) -> str:
        """Return the fills of all texts as JSON, in the pipeline's format."""
        fills = fill_mask(
            self.model,
            self.tokenizer,
            texts,
            top_k=self.top_k,
            targets=self.targets,
            truncate=self.truncate,
        )
        is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
        return json.dumps(fills, ensure_ascii=not is_unicode, indent=2)

    def fills(self, texts: list[str]) -> Iterator[str]:
        """Yield the fills of each text, and the steps that led to them, as lines."""
        if self.targets:
            fills = [self._fills_with_targets(text) for text in texts]
        else:
            fills = fill_mask(
                self.model,
                self.tokenizer,
                texts,
                top_k=self.top_k,
                truncate=self.truncate,
                batch_size=len(texts),
            )
            fills = fills if len(texts) > 1 else [fills]
        for text, text_fills in zip(texts, fills, strict=True):
            yield text
            several = isinstance(text_fills[0], list)
            for number, mask_fills in enumerate(text_fills if several else [text_fills], start=1):
                if several:
                    yield f"  mask {number}"
                yield from (f"  {line_of(fill)}" for fill in mask_fills)
            if self.with_steps and not self.targets:  # the steps ignore targets
                yield "\nstep by step"
                yield from (f"  {line}" for line in self.steps(text))
            yield ""

    def steps(self, text: str) -> Iterator[str]:
        """Yield one computation step by step, with its intermediate values, as lines."""
        limit = longest_input(self.tokenizer, self.model) if self.truncate else None
        with refusals_reported(self.model):
            predictions = predict(self.model, self.tokenizer, [text], limit)
        ((input_ids, mask_index, probabilities),) = predictions  # (T,), (M,), (M, V)
        yield f"input_ids   {input_ids.tolist()}"
        yield f"tokens      {self.tokenizer.convert_ids_to_tokens(input_ids.tolist())}"
        yield f"mask index  {mask_index.tolist()}"
        yield f"softmax     {tuple(probabilities.shape)}: for each mask, a probability per token"
        for index, row in zip(mask_index.tolist(), probabilities, strict=True):  # row: (V,)
            scores, tokens = row.topk(min(self.top_k, len(row)))  # (k,), (k,)
            yield f"top {self.top_k} at {index}  {tokens.tolist()}"
            for score, token in zip(scores.tolist(), tokens.tolist(), strict=True):
                yield f"  {score:<9.4g} {fill_in(self.tokenizer, input_ids, index, token)}"

    def _fills_with_targets(self, text: str) -> list:
        """Call fill_mask with the targets spelled for each mask according to the text before it."""
        assert self.targets
        n_masks = len(find_masks(self.tokenizer, self._ids(text), text))  # that --truncate leaves
        masks = re.finditer(re.escape(self.tokenizer.mask_token), text)
        befores = [text[: mask.start()] for mask in masks]
        from_end = self.tokenizer.truncation_side == "left"
        befores = befores[-n_masks:] if from_end else befores[:n_masks]
        befores += [" "] * (n_masks - len(befores))  # some tokenizers take "[mask]" for a mask, too
        spelled = [
            tuple(spell_target(self.tokenizer, target, before) for target in self.targets)
            for before in befores
        ]  # the targets of each mask
        fills = {
            targets: fill_mask(
                self.model,
                self.tokenizer,
                text,
                top_k=self.top_k,
                targets=list(targets),
                truncate=self.truncate,
            )
            for targets in dict.fromkeys(spelled)
        }
        if len(fills) == 1:
            return fills[spelled[0]]
        return [fills[targets][number] for number, targets in enumerate(spelled)]

    def joint(self, texts: list[str]) -> Iterator[str]:
        """Yield the joint fills of each text, in both orders, as lines."""
        for text in texts:
            yield text
            for order in ORDERS if text.count(self.tokenizer.mask_token) > 1 else ORDERS[:1]:
                yield f"  {order}"
                fills = fill_jointly(
                    self.model,
                    self.tokenizer,
                    text,
                    order,
                    top_k=self.top_k,
                    truncate=self.truncate,
                )
                for fill in fills:
                    words = " ".join(repr(self.tokenizer.decode([id])) for id in fill.tokens)
                    yield f"  {fill.score:<9.4g} {words}  {fill.sequence}"
            yield ""

    def scores(self, texts: list[str]) -> Iterator[str]:
        """Yield the scores of each text, per token and for the whole sentence, as lines."""
        for text in texts:
            scores = score_sentence(
                self.model, self.tokenizer, text, self.truncate, self.score_method
            )
            total = sum(score for _, score in scores)
            yield text
            for id, score in scores:
                yield f"  {score:9.4f}  p {math.exp(score):<9.4g}  {self.tokenizer.decode([id])!r}"
            yield (
                f"  {total:9.4f}  pseudo-log-likelihood of {len(scores)} tokens, "
                f"pseudo-perplexity {math.exp(min(-total / len(scores), 700)):.4g}\n"
            )

    def _ids(self, text: str) -> Tensor:
        inputs = encode(self.model, self.tokenizer, [text], self.truncate)
        return inputs["input_ids"][0]  # (T,)


def harmless(line: str) -> str:
    """Spell out the control characters of a text or a fill: a terminal would obey them."""
    return CONTROL.sub(lambda found: rf"\x{ord(found[0]):02x}", line)


def line_of(fill: dict) -> str:
    """Format one fill as a line: score, bar, token, sentence."""
    bar = "█" * round(fill["score"] * BAR_WIDTH)
    return f"{fill['score']:<9.4g} {bar:<{BAR_WIDTH}} {fill['token_str']!r:<14} {fill['sequence']}"
