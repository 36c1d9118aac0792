"""The probe: its regression against scikit-learn's, its states by hand, its folds, its command."""

import csv
import json

import numpy as np
import pytest
import torch
from transformers import BertModel

from mlm_scratch.hf.load import load_model, load_tokenizer
from mlm_scratch.probe import __main__ as probe
from mlm_scratch.probe.__main__ import fit_logistic, mean_states, predict
from tests.support.tiny import bert_config, byte_level_tokenizer, save_roberta


@pytest.mark.parametrize("n_labels", [2, 3])
def test_the_regression_is_scikit_learns(n_labels):
    library = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    random = np.random.default_rng(0)
    inputs = random.normal(size=(200, 10))
    targets = (inputs[:, :n_labels] + random.normal(size=(200, n_labels))).argmax(axis=1)
    weights, bias = fit_logistic(torch.tensor(inputs), torch.tensor(targets), n_labels)
    logits = torch.tensor(inputs) @ weights.T + bias
    theirs = library.LogisticRegression(C=1.0, tol=1e-8, max_iter=10_000)
    if n_labels == 2:  # it has one weight vector there: the difference, decayed half as much
        theirs.set_params(C=2.0)
    theirs.fit(inputs, targets)
    expected = torch.tensor(theirs.predict_proba(inputs))
    torch.testing.assert_close(logits.softmax(dim=1), expected, atol=1e-3, rtol=0)
    if n_labels > 2:
        torch.testing.assert_close(weights, torch.tensor(theirs.coef_), atol=1e-3, rtol=0)


def test_the_minimum_has_no_gradient():
    """Without a library: the condition that defines it."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(60, 4, dtype=torch.float64), torch.randint(3, (60,))
    weights, bias = fit_logistic(inputs, targets, 3, penalty=0.5)
    error = (inputs @ weights.T + bias).softmax(1) - torch.nn.functional.one_hot(targets, 3)
    torch.testing.assert_close(error.T @ inputs + 0.5 * weights, 0 * weights, atol=1e-3, rtol=0)
    torch.testing.assert_close(error.sum(0), 0 * bias, atol=1e-3, rtol=0)


@pytest.mark.parametrize("n", [10, 11, 21, 200])
def test_the_folds_are_as_many_and_as_equal_as_they_can_be(monkeypatch, n):
    """Seen from what each regression learns from."""
    learned_from = []

    def fit(inputs, targets, n_labels):
        learned_from.append(len(inputs))
        return torch.zeros(n_labels, inputs.shape[1], dtype=torch.float64), torch.zeros(n_labels)

    monkeypatch.setattr(probe, "fit_logistic", fit)
    predict(torch.randn(n, 3), torch.arange(n) % 2)
    held_out = [n - rest for rest in learned_from]
    assert len(held_out) == 5 and sum(held_out) == n and max(held_out) - min(held_out) <= 1


def test_states_are_means_over_tokens_without_padding(tmp_path):
    torch.manual_seed(0)
    save_roberta(tmp_path)
    texts = ["The heart.", "Paris is the capital of France, and Rome is the capital of Italy."]
    states = mean_states(str(tmp_path), texts)
    tokenizer, model = load_tokenizer(tmp_path), load_model(tmp_path).eval()
    for text, state in zip(texts, states, strict=True):
        with torch.no_grad():
            hidden = model.base_model(**tokenizer(text, return_tensors="pt"))[0][0]  # (T, H)
        torch.testing.assert_close(state, hidden.mean(dim=0), atol=1e-5, rtol=1e-4)


def test_no_text_is_predicted_by_a_regression_that_has_seen_it():
    """Labels at random: about half are right, though there are more weights than texts."""
    torch.manual_seed(0)
    states, targets = torch.randn(200, 300), torch.randint(2, (200,))
    assert 0.35 < (predict(states, targets) == targets).float().mean() < 0.65
    states[:, 0] += 20 * targets
    assert (predict(states[:, :10], targets) == targets).float().mean() > 0.99


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_the_command_compares_two_models(tmp_path, call, name):
    save_roberta(tmp_path / "one")
    torch.manual_seed(9)
    save_roberta(tmp_path / "two")
    rows = [
        {"text": f"{'A whale, a mammal' if i % 3 else 'Water boils'} {i}", "label": str(i % 3 > 0)}
        for i in range(30)
    ]
    with (tmp_path / name).open("w", newline="") as file:
        if name == "a.jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if name == "a.tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    models = [str(tmp_path / "one"), str(tmp_path / "two")]
    code, out, err = call(probe, tmp_path / name, "--models", *models)
    assert code == 0, err
    first, _, one, two, difference = out.splitlines()
    assert first == "30 texts, 2 labels, 5 folds; most frequent label: 0.667"
    assert one.endswith(models[0]) and two.endswith(models[1])
    assert float(difference.split()[0]) == pytest.approx(
        float(two.split()[0]) - float(one.split()[0]), abs=2e-3
    )
    assert difference.endswith(f"{models[1]}, minus the first")


def test_an_encoder_needs_no_head(tmp_path):
    BertModel(bert_config(vocab_size=320)).save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    assert mean_states(str(tmp_path), ["The heart.", "A whale."]).shape == (2, 32)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file"),
        ("text,label\na,b\n", "has 1 texts with 1 different labels"),
        ("text,kind\na,b\n", "a.csv has no label, but text, kind: see --text-column"),
        ("text,label\na\nb,c\n", "a.csv has no label, but text: see --text-column"),
        ("text,label\na,\nb,c\n", "line 2 of"),
        ('text,label\n"a,b\nb,c\n', "line 2 of"),
    ],
)
def test_what_cannot_be_probed_is_reported(tmp_path, call, content, message):
    if content is not None:
        (tmp_path / "a.csv").write_text(content)
    code, _, err = call(probe, tmp_path / "a.csv", "--models", tmp_path)
    assert code == 2 and message in err and len(err.splitlines()) == 1
