"""Exercise 1: `mask_tokens`."""

from typing import Any

import torch
from torch import Tensor

from mlm_scratch import masking
from mlm_scratch.exercise.judging import SIGMAS, Exercise, Wrong, drawn, equal, share_is

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
WORDS = (
    "the a an is was has of in on to and or by for with galaxy star moon planet sun sky water "
    "river sea fish bird cat dog tree leaf bread milk stone glass paper hand heart word book red "
    "blue white black green one two"
)
VOCABULARY = (*SPECIAL, *WORDS.split(" "))
V, MASK = len(VOCABULARY), SPECIAL.index("<mask>")
B, T = 256, 512  # so many tokens show 81/10/9 instead of 80/10/10, in all but 1 of 10^7 cases

START = '''"""Exercise 1: hide tokens. Judge it with:

python -m mlm_scratch.exercise masking my_masking.py
"""

import torch
from torch import Tensor


def mask_tokens(
    input_ids: Tensor,
    special_tokens_mask: Tensor,
    *,
    mask_token_id: int,
    vocab_size: int,
    mlm_probability: float = 0.15,
    mask_replace_prob: float = 0.8,
    random_replace_prob: float = 0.1,
    word_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Mask a random subset of the tokens, and label them with the ids to predict.

    Args:
        input_ids: (B, T) int64. Not changed.
        special_tokens_mask: (B, T) bool or int64, true (or 1) where a token is never selected.
        mask_token_id: id of the mask token.
        vocab_size: random ids are drawn from 0 ... vocab_size - 1.
        mlm_probability: share of the tokens to select.
        mask_replace_prob: share of the selected that become the mask token.
        random_replace_prob: share of the selected that become a random token; the rest stay.
        word_ids: (B, T), equal for neighbouring tokens of one word, -1 outside words.
        generator: source of all randomness; None: torch's own.

    Returns:
        (input_ids, labels), (B, T) int64 each: what the model sees, and the original id at every
        selected token, -100 elsewhere.
    """
    # 1. Select each token that is not special by chance, each independently of all others.
    # 2. The labels are the original ids there, and -100 everywhere else.
    # 3. Of the selected, 80 % become the mask token, 10 % a random one of the whole vocabulary, and
    #    10 % stay as they are, to be predicted all the same.
    # 4. With word_ids, draw once per word: its tokens share their fate. -1 is never selected.
    raise NotImplementedError
'''


def rows(n_rows: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return (n_rows, length) ids and which of them are special: the ends, and some padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(SPECIAL), V, (n_rows, length), generator=generator)  # (B, T)
    special = torch.zeros_like(ids, dtype=torch.bool)  # (B, T)
    ids[:, 0], ids[:, -1] = SPECIAL.index("<s>"), SPECIAL.index("</s>")
    ids[::2, -3:] = SPECIAL.index("<pad>")
    special[:, 0] = special[:, -1] = special[::2, -3:] = True
    return ids, special


def call(
    solution: Any, ids: Tensor, special: Tensor, rate: float, seed: int = 1, **options: Any
) -> tuple[Tensor, Tensor]:
    """Call the solution as the Collator does; check what comes back."""
    options = {"generator": torch.Generator().manual_seed(seed), "vocab_size": V, **options}
    result = solution.mask_tokens(ids, special, mask_token_id=MASK, mlm_probability=rate, **options)
    if not isinstance(result, tuple) or len(result) != 2:
        raise Wrong("two tensors: (input_ids, labels)", type(result).__name__)
    for name, tensor in zip(("input_ids", "labels"), result, strict=True):
        if not isinstance(tensor, Tensor):
            raise Wrong(f"{name} is a tensor", type(tensor).__name__)
        equal(f"the shape of {name}", tuple(tensor.shape), tuple(ids.shape))
        equal(f"the dtype of {name}", tensor.dtype, torch.int64)
    return result


def picture(
    row: int,
    ids: Tensor,
    seen: Tensor,
    labels: Tensor,
    start: int = 0,
    word_ids: Tensor | None = None,
) -> list[str]:
    """Draw tokens of a row from `start` on: at most 12."""
    part = slice(start, start + 12)

    def words(tensor: Tensor) -> list[str]:
        """Name the ids of the row."""
        return [VOCABULARY[id] if 0 <= id < V else str(id) for id in tensor[row, part].tolist()]

    shown = ["·" if word == "-100" else word for word in words(labels)]
    table = {"token": words(ids), "model sees": words(seen), "label": shown}
    if word_ids is not None:
        table["word"] = word_ids[row, part].tolist()
    return drawn(table)


def first(wrong: Tensor) -> tuple[int, int]:
    """Return row and column of the first true element of (B, T), the column a little before it."""
    row, column = wrong.nonzero()[0].tolist()
    return row, max(0, column - 5)


EXERCISE = Exercise(
    task="mask_tokens: select 15 % of the tokens, hide them 80/10/10, label them",
    lines=15,
    judged="by counting in 131,072 tokens, so that any order of draws may be right",
    defines=("mask_tokens",),
    start=START,
    twin=lambda solution: all(
        torch.equal(one, other)
        for seed in range(3)
        for one, other in zip(
            *(call(each, *rows(8, 128), 0.15, seed) for each in (solution, masking)), strict=True
        )
    ),
    timed=lambda solution: call(solution, *rows(8, 128), 0.15),
    chapter=masking,
)


@EXERCISE.check("two (B, T) int64 tensors come back", "clone first, and return a pair")
def shapes(solution: Any) -> None:
    """Of several shapes, with either kind of special_tokens_mask."""
    for n_rows, length in ((1, 8), (3, 16)):
        ids, special = rows(n_rows, length)
        call(solution, ids, special, 0.5)
        call(solution, ids, special.long(), 0.5)


@EXERCISE.check(
    "the caller's tensors stay as they are", "an operation that ends in _ writes in place"
)
def untouched(solution: Any) -> None:
    """Also special_tokens_mask; and what comes back is new."""
    ids, special = rows(16, 64)
    before = ids.clone(), special.clone()
    seen, labels = call(solution, ids, special, 0.5)
    if not torch.equal(ids, before[0]):
        raise Wrong("input_ids as given", "other ids", picture(0, before[0], ids, labels))
    equal("special_tokens_mask is as given", torch.equal(special, before[1]), True)
    equal("what comes back shares memory with input_ids", seen.data_ptr() == ids.data_ptr(), False)


@EXERCISE.check("special tokens are never selected", "neither at the ends nor in the padding")
def special_tokens(solution: Any) -> None:
    """At a rate of 1."""
    ids, special = rows(64, 64)
    for mask in (special, special.long()):
        seen, labels = call(solution, ids, mask, 1.0)
        wrong = special & ((labels != -100) | (seen != ids))
        if wrong.any():
            row, start = first(wrong)
            drawing = picture(row, ids, seen, labels, start)
            raise Wrong("special tokens as they were, label -100", "one is selected", drawing)


@EXERCISE.check(
    "labels are the original ids, -100 where nothing is selected",
    "what is kept unchanged is predicted, too; and only selected tokens change",
)
def label_values(solution: Any) -> None:
    """At a rate of 0 none has a label, at 1 all have one; at 0.3 the rest is unchanged."""
    ids, special = rows(64, 64)
    seen, labels = call(solution, ids, special, 0.0)
    if not ((labels == -100) & (seen == ids)).all():
        drawing = picture(0, ids, seen, labels)
        raise Wrong("at a rate of 0, all labels -100 and no change", "something else", drawing)
    seen, labels = call(solution, ids, special, 1.0)
    wrong = ~special & (labels != ids)
    if wrong.any():
        row, start = first(wrong)
        drawing = picture(row, ids, seen, labels, start)
        raise Wrong(
            "at a rate of 1, every token that is not special as its label", "not all", drawing
        )
    seen, labels = call(solution, ids, special, 0.3)
    wrong = (labels != -100) & (labels != ids) | (labels == -100) & (seen != ids)
    if wrong.any():
        row, start = first(wrong)
        drawing = picture(row, ids, seen, labels, start)
        raise Wrong("label -100 and no change, or the original id", "something else", drawing)


@EXERCISE.check(
    "mlm_probability of the tokens are selected", "one draw per token, compared with it"
)
def selected_share(solution: Any) -> None:
    """At 15 % and at 50 %; the share of the tokens that are not special."""
    ids, special = rows(B, T)
    for rate in (0.15, 0.5):
        _, labels = call(solution, ids, special, rate)
        n = int((~special).sum())
        share_is(f"share selected at {rate}", int((labels != -100).sum()), n, rate)


@EXERCISE.check(
    "each token is selected by itself, not a fixed number per row",
    "numbers of masked tokens differ from row to row as heads among coins do",
)
def count_per_row(solution: Any) -> None:
    """The variance of the numbers per row is that of a binomial distribution."""
    ids, special = rows(B, T)
    _, labels = call(solution, ids, special, 0.15)
    n = (~special).sum(dim=1).double()  # (B,)
    counts = (labels != -100).sum(dim=1)  # (B,)
    scores = (counts - 0.15 * n) ** 2 / (n * 0.15 * 0.85)  # (B,) mean 1, variance about 2
    off = SIGMAS * (2 / B) ** 0.5 * 1.3  # 1.3: its tail is longer than a normal one
    if abs(float(scores.mean()) - 1) > off:
        came = (
            f"{float(scores.mean()):.2f}; the first rows have {counts[:6].tolist()} masked tokens"
        )
        raise Wrong(f"variance over the rows / that of coins: 1, give or take {off:.2g}", came)


@EXERCISE.check(
    "80 % become the mask token, 10 % a random one, 10 % stay",
    "10 % of all selected: of what is left after the mask tokens, that is half",
)
def treatment(solution: Any) -> None:
    """At a rate of 1, where every token is a sample; with other shares; and at 15 %, too."""
    ids, special = rows(B, T)
    for rate, mask_share, random_share in (
        (1.0, 0.8, 0.1),
        (1.0, 0.5, 0.3),
        (1.0, 1.0, 0.0),
        (1.0, 0.0, 0.0),
        (0.15, 0.8, 0.1),
    ):
        shares: dict[str, Any] = {
            "mask_replace_prob": mask_share,
            "random_replace_prob": random_share,
        }
        seen, labels = call(solution, ids, special, rate, **shares)
        selected = ~special if rate == 1 else labels != -100
        count_treatments(seen[selected], ids[selected], mask_share, random_share)


def count_treatments(seen: Tensor, ids: Tensor, mask_share: float, random_share: float) -> None:
    """Compare the shares among selected tokens, (n,) each."""
    n, hits = len(ids), random_share / V  # a random id is the mask, or the original one, by chance
    what = f"with {mask_share:.0%} and {random_share:.0%}, share of"
    share_is(f"{what} mask tokens", int((seen == MASK).sum()), n, mask_share + hits)
    kept = 1 - mask_share - random_share + hits
    share_is(f"{what} unchanged tokens", int((seen == ids).sum()), n, kept)


@EXERCISE.check(
    "random ids come from the whole vocabulary", "0 ... vocab_size - 1, special ones and all"
)
def random_ids(solution: Any) -> None:
    """Each id equally often, whatever the original."""
    ids, special = rows(128, 256)
    ids[:] = V - 1
    special[:] = False
    shares: dict[str, Any] = {"mask_replace_prob": 0.0, "random_replace_prob": 1.0}
    seen, _ = call(solution, ids, special, 1.0, **shares)
    equal("ids are below vocab_size", bool(((seen >= 0) & (seen < V)).all()), True)
    counts = seen.flatten().bincount(minlength=V).tolist()
    for id, count in enumerate(counts):
        share_is(f"share of {VOCABULARY[id]} (id {id})", count, ids.numel(), 1 / V)
    seen, _ = call(solution, ids, special, 1.0)  # 80/10/10: of what is neither mask nor original
    rest = seen[(seen != MASK) & (seen != V - 1)]
    counts = rest.bincount(minlength=V).tolist()
    for id in {*range(V)} - {MASK, V - 1}:
        what = f"with 80/10/10, share of {VOCABULARY[id]} (id {id}) among random ones"
        share_is(what, counts[id], len(rest), 1 / (V - 2))


@EXERCISE.check(
    "rows, positions and calls are independent", "draw for every token of every row, in every call"
)
def independent(solution: Any) -> None:
    """Selected together, or treated together, no more often than by chance."""
    ids, special = rows(128, 256)
    special[:] = False
    generator = torch.Generator().manual_seed(5)
    shares: dict[str, Any] = {"mask_replace_prob": 0.5, "random_replace_prob": 0.0}
    pairs = [call(solution, ids, special, 0.5, generator=generator, **shares) for _ in range(2)]
    for what, draws in (
        ("selected", [labels != -100 for _, labels in pairs]),
        ("masked where selected", [seen == MASK for seen, _ in pairs]),
    ):
        one, again = (draw.double() - draw.double().mean() for draw in draws)  # (B, T)
        for where, left, right in (
            ("in two calls", one, again),
            ("in neighbouring rows", one[1:], one[:-1]),
            ("at neighbouring positions", one[:, 1:], one[:, :-1]),
            ("two positions apart", one[:, 2:], one[:, :-2]),
        ):
            spread = float(one.var())
            n = left.numel()
            correlation = float((left * right).mean()) / spread
            if not abs(correlation) <= SIGMAS / n**0.5:  # NaN is no correlation either
                came = f"{correlation:.3f}"
                raise Wrong(f"correlation of {what} {where}: 0 within {SIGMAS / n**0.5:.2g}", came)


@EXERCISE.check(
    "all randomness comes from the generator",
    "every draw takes it as an argument; without one, torch's own does",
)
def generator_used(solution: Any) -> None:
    """The same seed, the same masks, whatever torch's own generator does."""
    ids, special = rows(64, 64)
    torch.manual_seed(1)
    one = call(solution, ids, special, 0.5, seed=3)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    again = call(solution, ids, special, 0.5, seed=3)
    equal("equal seeds give equal results", all(map(torch.equal, one, again)), True)
    torch.manual_seed(1)
    equal(
        "torch's own generator stays where it is", torch.equal(state, torch.get_rng_state()), True
    )
    other = call(solution, ids, special, 0.5, seed=4)
    equal("another seed gives the same result", torch.equal(one[1], other[1]), False)
    without = [call(solution, ids, special, 0.5, generator=None)[1] for _ in range(2)]
    equal("two calls without a generator are the same", torch.equal(*without), False)


def words_of(n_rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, special, and the number of each token's word in its row: 1 to 3 tokens each.

    Some ordinary tokens are outside words; some special ones have the number of a word.
    """
    ids, special = rows(n_rows, length)
    starts = torch.rand(ids.shape, generator=torch.Generator().manual_seed(7)) < 0.6  # (B, T)
    starts[:, 1] = True
    words = starts.cumsum(dim=1)  # (B, T)
    words[:, 0] = -1
    words[:, 9::10] = -1
    return ids, special, words


@EXERCISE.check(
    "with word_ids, the tokens of a word share their fate", "draw once per word, and look it up"
)
def whole_words(solution: Any) -> None:
    """Selected together, and masked, replaced or kept together."""
    ids, special, words = words_of(128, 256)
    outside = special | (words == -1)  # (B, T)
    together = (words[:, 1:] == words[:, :-1]) & ~outside[:, 1:] & ~outside[:, :-1]  # (B, T - 1)

    def whole(what: str, fate: Tensor, seen: Tensor, labels: Tensor, chance: int = 0) -> None:
        """Raise Wrong if more than `chance` words have a part with another fate."""
        wrong = (fate[:, 1:] != fate[:, :-1]) & together
        if int(wrong.sum()) > chance:
            row, start = first(wrong)
            drawing = picture(row, ids, seen, labels, start, words)
            raise Wrong(f"all tokens of a word {what}, or none", "a part of one", drawing)

    seen, labels = call(solution, ids, special, 0.5, word_ids=words)
    selected = labels != -100
    whole("selected", selected, seen, labels)
    begins = ~outside
    begins[:, 1:] &= ~together
    share_is("share of words selected at 0.5", int(selected[begins].sum()), int(begins.sum()), 0.5)
    equal("tokens selected that are special or outside words", int((selected & outside).sum()), 0)
    for mask_share, random_share in ((0.5, 0.0), (0.0, 0.5)):
        shares: dict[str, Any] = {
            "mask_replace_prob": mask_share,
            "random_replace_prob": random_share,
        }
        # In so large a vocabulary a random id is hardly ever the original one.
        seen, labels = call(
            solution, ids, special, 1.0, word_ids=words, vocab_size=50_000, **shares
        )
        whole("replaced", seen != ids, seen, labels, chance=10)


@EXERCISE.check(
    "words, too, are drawn for each row, and treated 80/10/10",
    "the first word of each row is another",
)
def words_by_row(solution: Any) -> None:
    """Words of two tokens that begin at the same place in every row."""
    ids, special = rows(128, 256)
    special[:] = False
    words = (torch.arange(256) // 2).expand(128, 256)  # (B, T)
    seen, labels = call(solution, ids, special, 0.5, word_ids=words)
    one = (labels != -100)[:, ::2].double() - 0.5  # (B, words)
    correlation, limit = float((one[1:] * one[:-1]).mean()) * 4, SIGMAS / one[1:].numel() ** 0.5
    if not abs(correlation) <= limit:
        came = f"{correlation:.3f}"
        raise Wrong(f"correlation of words in neighbouring rows: 0 within {limit:.2g}", came)
    seen, labels = call(solution, ids, special, 1.0, word_ids=words)
    count_treatments(seen[:, ::2].flatten(), ids[:, ::2].flatten(), 0.8, 0.1)
