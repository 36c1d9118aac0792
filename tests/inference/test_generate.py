"""A text from masks: each round against the same choice made by hand."""

import pytest
import torch

import infer
from mlm_scratch.inference.generate import generate
from mlm_scratch.util.errors import UserError
from tests.support.tiny import byte_level_tokenizer, roberta

TOKENIZER = byte_level_tokenizer()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return roberta(TOKENIZER, initializer_range=0.3).eval()


@torch.no_grad()
def best(model, ids, position):
    """(probability, id) of the best token that is no special one."""
    p = model(input_ids=ids[None]).logits[0, position].softmax(dim=-1)  # (V,)
    p[TOKENIZER.all_special_ids] = 0
    return p.max().item(), p.argmax().item()


def shown(ids):
    text = TOKENIZER.decode([id for id in ids.tolist() if id not in (0, 1, 2)])
    return " ".join(text.replace("<mask>", " _ ").split())


def test_the_more_certain_half_is_filled_in_each_round(model):
    """5 masks: 3, then 1, then 1; and with --remask the less certain 3 of them again."""
    ids = TOKENIZER("The Way <mask><mask><mask><mask><mask>", return_tensors="pt")["input_ids"][0]
    masks = (ids == TOKENIZER.mask_token_id).nonzero().flatten().tolist()
    expected, certainty = [shown(ids)], {}
    for again in (False, True):
        if again:
            for position in sorted(masks, key=certainty.get)[:3]:
                ids[position] = TOKENIZER.mask_token_id
        while open_masks := [m for m in masks if ids[m] == TOKENIZER.mask_token_id]:
            of_mask = {mask: best(model, ids, mask) for mask in open_masks}
            most = sorted(open_masks, key=lambda mask: -of_mask[mask][0])
            for mask in most[: (len(open_masks) + 1) // 2]:
                certainty[mask], ids[mask] = of_mask[mask]
            expected.append(shown(ids))
    assert list(generate(model, TOKENIZER, "The Way", 5, remask=1)) == expected
    assert list(generate(model, TOKENIZER, "The Way", 5)) == expected[:4]
    assert len(expected) == 1 + 3 + 2


def test_it_may_begin_with_nothing_and_ends_without_masks(model):
    *_, last = generate(model, TOKENIZER, "", 7)
    assert "_" not in last.split()


def test_the_command(files, call):
    code, out, _ = call(infer, "--model", files / "model", "--generate", 4, "The Way")
    assert code == 0 and out.splitlines()[0] == "The Way _ _ _ _" and len(out.splitlines()) == 4
    for flags, message in (
        (["--generate", 0], "--generate must be at least 1"),
        (["--generate", 2, "--remask", -1], "--remask must be at least 0"),
        (["--remask", 1], "--remask goes with --generate only"),
        (["--score-method", "original"], "--score-method goes with --score or --pairs only"),
        (["--generate", 2, "--targets", "is"], "--targets does not go with --generate"),
    ):
        code, _, err = call(infer, "--model", files / "model", "The Way", *flags)
        assert code == 2 and message in err
    with pytest.raises(UserError, match="the model takes 64"):
        list(generate(roberta(TOKENIZER), TOKENIZER, "The Way", 100))
