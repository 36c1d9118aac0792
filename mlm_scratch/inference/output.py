"""What infer.py prints: fills, masks filled together, scores, or what the pipeline returns."""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlm_scratch.fill_mask import fill_mask, walk_through
from mlm_scratch.hf.checks import ignores_padding
from mlm_scratch.hf.encode import encode, find_masks, find_words, spell_target
from mlm_scratch.inference.joint import ORDERS, fill_jointly, score_sentence
from mlm_scratch.util.errors import UserError
from mlm_scratch.util.progress import progress_bar

BATCH = 8  # texts at once
BAR_WIDTH = 20


@dataclass
class Answers:
    """What a model and its tokenizer say to `asked`, the command line of infer.py."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    asked: argparse.Namespace

    def check(self, texts: list[str]) -> None:
        """Raise UserError for the first text that cannot be filled or scored."""
        find = find_words if self.asked.what == "score" else find_masks
        for number, text in enumerate(texts, start=1):
            try:
                find(self.tokenizer, self._ids(text), text)
            except UserError as error:
                which = f"text {number}: " if len(texts) > 1 else ""
                raise UserError(f"{which}{error}") from error

    def show(self, texts: list[str]) -> None:
        """Print what is asked of each text, BATCH of them at a time, with a bar if many."""
        if self.asked.what == "json":
            print(self.as_json(texts))
            return
        lines_of = {"fills": self.fills, "joint": self.joint, "score": self.scores}[self.asked.what]
        # Targets may be spelled otherwise in each text; joint fills and scores are batches anyway.
        one_by_one = len(texts) == 1 or self.asked.targets or self.asked.what != "fills"
        size = 1 if one_by_one or not ignores_padding(self.model, self.tokenizer) else BATCH
        at_once = len(texts) <= size
        with progress_bar(total=len(texts), unit=" texts", leave=False, disable=at_once) as bar:
            for start in range(0, len(texts), size):
                batch = texts[start : start + size]
                lines = list(lines_of(batch))
                with bar.external_write_mode():
                    print(*lines, sep="\n")
                bar.update(len(batch))

    def as_json(self, texts: list[str]) -> str:
        """What the pipeline returns for all texts."""
        fills = fill_mask(
            self.model,
            self.tokenizer,
            texts,
            top_k=self.asked.top_k,
            targets=self.asked.targets,
            truncate=self.asked.truncate,
        )
        can_show_all = (sys.stdout.encoding or "").lower().startswith("utf")
        return json.dumps(fills, ensure_ascii=not can_show_all, indent=2)

    def fills(self, texts: list[str]) -> Iterator[str]:
        """The fills of each text; of one named on the command line also the way to them, unless
        that is cut short by targets."""
        asked = self.asked
        if asked.targets:
            fills = [self._fills_with_targets(text) for text in texts]
        else:
            fills = fill_mask(
                self.model,
                self.tokenizer,
                texts,
                top_k=asked.top_k,
                truncate=asked.truncate,
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
            if asked.texts and not asked.targets:
                yield "\nstep by step"
                steps = walk_through(self.model, self.tokenizer, text, asked.top_k, asked.truncate)
                yield from (f"  {line}" for line in steps)
            yield ""

    def _fills_with_targets(self, text: str) -> list:
        """What fill_mask returns, with targets spelled for each mask as the text before it asks."""
        n_masks = len(find_masks(self.tokenizer, self._ids(text), text))  # that --truncate leaves
        masks = re.finditer(re.escape(self.tokenizer.mask_token), text)
        befores = [text[: mask.start()] for mask in masks]
        from_end = self.tokenizer.truncation_side == "left"
        befores = befores[-n_masks:] if from_end else befores[:n_masks]
        befores += [" "] * (n_masks - len(befores))  # where "[mask]" is taken for a mask, too
        spelled = [
            tuple(spell_target(self.tokenizer, target, before) for target in self.asked.targets)
            for before in befores
        ]  # the targets of each mask
        fills = {
            targets: fill_mask(
                self.model,
                self.tokenizer,
                text,
                top_k=self.asked.top_k,
                targets=list(targets),
                truncate=self.asked.truncate,
            )
            for targets in dict.fromkeys(spelled)
        }
        if len(fills) == 1:
            return fills[spelled[0]]
        return [fills[targets][number] for number, targets in enumerate(spelled)]

    def joint(self, texts: list[str]) -> Iterator[str]:
        """All masks of each text filled together, in both orders."""
        for text in texts:
            yield text
            for order in ORDERS if text.count(self.tokenizer.mask_token) > 1 else ORDERS[:1]:
                yield f"  {order}"
                fills = fill_jointly(
                    self.model,
                    self.tokenizer,
                    text,
                    order,
                    top_k=self.asked.top_k,
                    truncate=self.asked.truncate,
                )
                for fill in fills:
                    words = " ".join(repr(self.tokenizer.decode([id])) for id in fill.tokens)
                    yield f"  {fill.score:<9.4g} {words}  {fill.sequence}"
            yield ""

    def scores(self, texts: list[str]) -> Iterator[str]:
        """Pseudo-log-likelihood and pseudo-perplexity of each text, and what each token gives."""
        for text in texts:
            scores = score_sentence(self.model, self.tokenizer, text, self.asked.truncate)
            total = sum(score for _, score in scores)
            yield text
            for id, score in scores:
                yield f"  {score:9.4f}  p {math.exp(score):<9.4g}  {self.tokenizer.decode([id])!r}"
            yield (
                f"  {total:9.4f}  pseudo-log-likelihood of {len(scores)} tokens, "
                f"pseudo-perplexity {math.exp(min(-total / len(scores), 700)):.4g}\n"
            )

    def _ids(self, text: str) -> Tensor:
        inputs = encode(self.model, self.tokenizer, [text], self.asked.truncate)
        return inputs["input_ids"][0]  # (T,)


def line_of(fill: dict) -> str:
    """One fill on one line: score, bar, token, sentence."""
    bar = "█" * round(fill["score"] * BAR_WIDTH)
    return f"{fill['score']:<9.4g} {bar:<{BAR_WIDTH}} {fill['token_str']!r:<14} {fill['sequence']}"
