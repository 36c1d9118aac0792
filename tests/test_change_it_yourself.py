"""The changes that the guide describes, each run as it is printed there."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.tiny import NUMBERED

GUIDE = Path(__file__).parents[1] / "mlm_scratch/README.md"
SECTION = GUIDE.read_text(encoding="utf-8").split("## Change it yourself")[1].split("\n## ")[0]
SCRIPT, *CHANGES = re.findall(r"```python\n(.*?)```", SECTION, re.S)
TITLES = re.findall(r"^\| ([a-z ]+) \| (?:`|where)", SECTION, re.M)
NAMES = '"distilbert/distilroberta-base", "notes.txt"'


def assigned(statement):
    """The name that a line assigns."""
    return ast.unparse(statement.targets[0]) if isinstance(statement, ast.Assign) else None


def run(files, change=""):
    """Run the script with a change; return all names that it defines."""
    statements, changed = ast.parse(SCRIPT).body, ast.parse(change).body
    if changed:
        (place,) = [i for i, s in enumerate(statements) if assigned(s) == assigned(changed[-1])]
        statements[place : place + 1] = changed
    code = ast.unparse(ast.Module(statements, type_ignores=[]))
    paths = f'"{files / "model"}", "{files / "a.txt"}"'
    names = {}
    torch.manual_seed(0)
    exec(code.replace(NAMES.replace('"', "'"), paths).replace("128", "48"), names)
    return names


@pytest.fixture(scope="module")
def changed(files):
    """What each change leads to, by its number in the guide; the script itself is None."""
    runs = {}

    def of(number):
        if number not in runs:
            runs[number] = run(files, "" if number is None else CHANGES[number])
        return runs[number]

    return of


def batches(names):
    """All batches of the first epoch, masked as at the start of the run."""
    names["collator"].generator.manual_seed(42)
    steps = names["loader"].steps(0, names["loader"].steps_per_epoch)
    return [batch for step in steps for batch in step.batches]


def test_there_is_a_change_for_every_row_of_the_table():
    assert len(TITLES) == len(CHANGES) == 8 and SCRIPT.count(NAMES) == 1


@pytest.mark.parametrize("number", [None, *range(8)])
def test_it_trains(changed, number):
    losses = changed(number)["losses"]
    assert len(losses) >= 12 and np.isfinite(losses).all()


def test_spans_are_masked(changed):
    def share_with_a_masked_neighbour(number):
        masked = torch.cat([batch.labels[:, :12] for batch in batches(changed(number))]) != -100
        beside = torch.zeros_like(masked)
        beside[:, 1:] |= masked[:, :-1]
        beside[:, :-1] |= masked[:, 1:]
        return (masked & beside).sum() / masked.sum()

    assert share_with_a_masked_neighbour(0) > 0.7 > 0.5 > share_with_a_masked_neighbour(None)


def test_half_of_the_masked_tokens_are_their_neighbours(changed):
    names = changed(1)
    original, seen, before = [], [], []
    for batch in batches(names):
        ids = torch.where(batch.labels == -100, batch.input_ids, batch.labels)
        is_masked = batch.labels != -100
        original.append(ids[is_masked])
        seen.append(batch.input_ids[is_masked])
        before.append(ids.roll(1, dims=1)[is_masked])
    original, seen, before = map(torch.cat, (original, seen, before))
    is_mask = seen == names["tokenizer"].mask_token_id
    assert 0.3 < is_mask.float().mean() < 0.7 and torch.equal(seen[~is_mask], before[~is_mask])
    assert not torch.equal(seen[~is_mask], original[~is_mask])


def test_the_loss_is_smoothed(changed):
    names = changed(2)
    logits, labels = names["model"].masked_logits(batches(names)[0])
    log_p = logits.log_softmax(dim=1)
    own, all_tokens = log_p.gather(1, labels[:, None]).sum(), log_p.mean(dim=1).sum()
    assert names["model"].loss(logits, labels).item() == pytest.approx(
        -(0.9 * own + 0.1 * all_tokens).item(), rel=1e-5
    )


def test_the_rate_falls_with_the_root_of_the_step(changed):
    names = changed(3)
    (rate, _) = names["schedule"].get_last_lr()
    assert rate == pytest.approx(2e-5 / (1 + names["total_steps"]) ** 0.5)


def test_the_optimizer_is_sgd(changed):
    names = changed(4)
    assert type(names["optimizer"]) is torch.optim.SGD
    assert names["losses"][-1] < names["losses"][0] - 0.5


def test_short_rows_come_first(changed):
    tokens = [int(step.n_tokens) for step in changed(5)["loader"].steps(0, 6)]
    assert tokens == sorted(tokens) and tokens != [
        int(step.n_tokens) for step in changed(None)["loader"].steps(0, 6)
    ]


def test_the_text_is_made_on_the_fly(changed):
    names = changed(6)
    assert len(names["rows"]) == 100 != len(NUMBERED)
    row = names["rows"].tokens[: names["rows"].starts[1]]
    assert names["tokenizer"].decode(row, skip_special_tokens=True) == "0 plus 0 is 0."


def test_every_batch_is_as_wide_and_has_the_same_loss(changed):
    assert {batch.input_ids.shape[1] for batch in batches(changed(7))} == {48}
    assert len({batch.input_ids.shape[1] for batch in batches(changed(None))}) > 1
    model = changed(None)["model"].eval()
    padded, plain = (batches(changed(number))[0] for number in (7, None))
    assert torch.equal(padded.labels[padded.labels != -100], plain.labels[plain.labels != -100])
    assert model(padded).item() == pytest.approx(model(plain).item(), rel=1e-5)
