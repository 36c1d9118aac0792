"""Joint fills and scores of sentences, against all combinations computed one by one."""

import copy
import math

import pytest
import torch

from mlm_scratch.inference.generate import generate
from mlm_scratch.inference.joint import ORDERS, fill_jointly
from mlm_scratch.inference.score import score_sentence
from tests.support.tiny import byte_level_tokenizer, roberta

TOKENIZER = byte_level_tokenizer()
TEXT = "The <mask> Way is a <mask> galaxy."


@pytest.fixture(scope="module")
def model():
    """Weights so large that the masks depend on each other."""
    torch.manual_seed(3)
    return roberta(TOKENIZER, initializer_range=0.3).eval()


@torch.no_grad()
def log_p(model, ids, position):
    """(V,) log-probabilities at one position; the mask token is never a fill."""
    scores = model(input_ids=ids[None]).logits[0, position].log_softmax(dim=-1)  # (V,)
    scores[TOKENIZER.mask_token_id] = -math.inf
    return scores


@pytest.mark.parametrize("order", ORDERS)
def test_beam_search_finds_the_best_of_all_pairs(model, order):
    ids = TOKENIZER(TEXT, return_tensors="pt")["input_ids"][0]  # (T,)
    masks = (ids == TOKENIZER.mask_token_id).nonzero().flatten().tolist()
    certainty = [log_p(model, ids, position).max().item() for position in masks]
    assert certainty[1] > certainty[0]  # so the two orders differ
    first, second = masks if order == ORDERS[0] else reversed(masks)
    of_first = log_p(model, ids, first)  # (V,)
    pairs = torch.full((len(TOKENIZER), len(TOKENIZER)), -math.inf)  # (V, V)
    for a in range(len(TOKENIZER)):
        if a != TOKENIZER.mask_token_id:
            filled = ids.clone()
            filled[first] = a
            pairs[a] = of_first[a] + log_p(model, filled, second)
    best = pairs.flatten().topk(3)
    fills = fill_jointly(model, TOKENIZER, TEXT, order, top_k=3, beams=len(TOKENIZER))
    for fill, score, where in zip(fills, best.values, best.indices, strict=True):
        assert fill.score == pytest.approx(score.exp().item(), rel=1e-4)
        tokens = {first: where.item() // len(TOKENIZER), second: where.item() % len(TOKENIZER)}
        assert fill.tokens == [tokens[position] for position in masks]
    # Each mask by itself, as in the pipeline, has other fills.
    alone = [log_p(model, ids, position).argmax().item() for position in masks]
    assert alone != fills[0].tokens


@torch.no_grad()
def test_the_most_certain_mask_is_found_again_after_each_fill(model):
    """Three masks, one beam: each round fills the mask with the largest probability then."""
    text = "The <mask> Way is a <mask> galaxy <mask>"
    ids = TOKENIZER(text, return_tensors="pt")["input_ids"][0]  # (T,)
    masks = (ids == TOKENIZER.mask_token_id).nonzero().flatten().tolist()
    left, order, total = list(masks), [], 0.0
    while left:
        best = {position: log_p(model, ids, position).max(dim=0) for position in left}
        position = max(left, key=lambda position: best[position].values.item())
        order.append(position)
        ids[position] = best[position].indices
        total += best[position].values.item()
        left.remove(position)
    assert order not in (masks, masks[::-1])
    (fill,) = fill_jointly(model, TOKENIZER, text, ORDERS[1], top_k=1, beams=1)
    assert fill.tokens == ids[masks].tolist()
    assert fill.score == pytest.approx(math.exp(total), rel=1e-4)


@pytest.mark.parametrize("order", ORDERS)
def test_an_id_without_a_token_is_no_fill(order):
    """Embeddings padded to a multiple of 64: 56 ids that the tokenizer does not have."""
    torch.manual_seed(3)
    padded = roberta(TOKENIZER, vocab_size=len(TOKENIZER) + 56).eval()
    padded.lm_head.bias.data[len(TOKENIZER) :] = 9.0  # the most probable ones
    for fill in fill_jointly(padded, TOKENIZER, TEXT, order, top_k=20):
        assert max(fill.tokens) < len(TOKENIZER)
    *_, last = generate(padded, TOKENIZER, "The", 6)
    assert last.startswith("The") and len(TOKENIZER(last)["input_ids"]) > 3


def test_impossible_fills_are_not_returned(model):
    changed = copy.deepcopy(model)
    changed.lm_head.bias.data[10:] = -math.inf
    fills = fill_jointly(changed, TOKENIZER, TEXT, ORDERS[0], top_k=100)
    assert len(fills) == 81  # 9 tokens, the mask token left out, for each of two masks
    assert all(fill.score > 0 and max(fill.tokens) < 10 for fill in fills)


def test_no_more_than_the_given_beams_are_kept(model, rows_of_each_pass):
    text = "The <mask> Way <mask> a <mask> galaxy."
    fills = fill_jointly(model, TOKENIZER, text, ORDERS[1], top_k=2, beams=4)
    assert len(fills) == 2 and rows_of_each_pass == [1, 4, 4]


def test_a_score_masks_each_token_by_itself(model):
    text = "Paris is the capital of France, and Rome is the capital of Italy."
    ids = TOKENIZER(text, return_tensors="pt")["input_ids"][0]  # (T,)
    scores = score_sentence(model, TOKENIZER, text, method="original")
    assert [id for id, _ in scores] == ids[1:-1].tolist()
    for position, (id, score) in enumerate(scores, start=1):
        masked = ids.clone()
        masked[position] = TOKENIZER.mask_token_id
        assert score == pytest.approx(log_p(model, masked, position)[id].item(), rel=1e-4)


WORDS = "Unbelievable misunderstandings happen, occasionally."


def test_words_of_several_tokens_do_not_give_themselves_away(model):
    """PLL-word-l2r: with a token, the later tokens of its word are masked, too."""
    encoding = TOKENIZER(WORDS, return_tensors="pt")
    (ids,) = encoding["input_ids"]  # (T,)
    words = encoding.word_ids()
    scores = score_sentence(model, TOKENIZER, WORDS)
    assert [id for id, _ in scores] == ids[1:-1].tolist()
    several = 0
    for position, (id, score) in enumerate(scores, start=1):
        masked = ids.clone()
        for later in range(position, len(ids)):
            if words[later] == words[position]:
                masked[later] = TOKENIZER.mask_token_id
        several += (masked == TOKENIZER.mask_token_id).sum() > 1
        assert score == pytest.approx(log_p(model, masked, position)[id].item(), rel=1e-4)
    assert several > 5
