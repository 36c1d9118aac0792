"""A probe: how well the hidden states of a frozen encoder tell labels apart.

python -m mlm_scratch.probe labelled.csv
python -m mlm_scratch.probe labelled.jsonl --models distilbert/distilroberta-base runs/latest/model

Each text is the mean of its tokens' hidden states, (H,). A logistic regression learns the labels
from them in 5 folds: every text is predicted once, by a regression that has not seen it. All models
get the same folds, so the difference between two accuracies has an interval, too.
"""

import argparse
import sys
from typing import TYPE_CHECKING

from mlm_scratch.data.tables import read_table
from mlm_scratch.hf.hub import go_offline_without_hub, newest_model
from mlm_scratch.util.errors import OneLineParser, UserError, run_command
from mlm_scratch.util.intervals import difference_interval, wilson_interval

if TYPE_CHECKING:
    from torch import Tensor

FOLDS, BATCH_SIZE = 5, 16


def main() -> None:
    """Read the labelled texts, probe each model, and print the accuracies."""
    arguments = parse_arguments()
    texts, labels = read_labelled(arguments.file, arguments.text_column, arguments.label_column)
    names, n = sorted(set(labels)), len(texts)
    if len(names) < 2 or n < 2 * FOLDS:
        raise UserError(
            f"{arguments.file} has {n} texts with {len(names)} different labels: a probe needs at "
            f"least {2 * FOLDS} texts and 2 labels"
        )
    models = arguments.models or [str(newest_model())]
    go_offline_without_hub(*models)
    import torch

    targets = torch.tensor([names.index(label) for label in labels])  # (N,)
    most = targets.bincount().max().item() / n
    print(f"{n:,} texts, {len(names)} labels, {FOLDS} folds; most frequent label: {most:.3f}")
    print(f"{'accuracy':<10}{'95 % interval':<18}model")
    right = []
    for model in models:
        right.append(predict(mean_states(model, texts), targets) == targets)  # (N,)
        low, high = wilson_interval(n_right := int(right[-1].sum()), n)
        print(f"{n_right / n:<10.3f}{f'{low:.3f} to {high:.3f}':<18}{model}", flush=True)
    for model, other in zip(models[1:], right[1:], strict=True):
        gain, low, high = difference_interval(right[0].tolist(), other.tolist())
        print(f"{gain:<+10.3f}{f'{low:+.3f} to {high:+.3f}':<18}{model}, minus the first")


def read_labelled(path: str, text_column: str, label_column: str) -> tuple[list[str], list[str]]:
    """Read texts and labels from a table (data/tables.py). Raises UserError."""
    texts, labels = [], []
    for number, values in read_table(path):
        by_name = {name.lower(): value for name, value in values.items()}
        for name in (text_column, label_column):
            if name.lower() not in by_name:
                raise UserError(
                    f"line {number} of {path} has no {name}, but {', '.join(values) or 'nothing'}: "
                    "see --text-column and --label-column"
                )
        texts.append(by_name[text_column.lower()])
        labels.append(by_name[label_column.lower()].strip())
    return texts, labels


def mean_states(name: str, texts: list[str]) -> "Tensor":
    """Return the mean hidden state of each text, (N, H)."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from mlm_scratch.hf.checks import check_no_nan, ignores_padding
    from mlm_scratch.hf.encode import encode, refusals_reported
    from mlm_scratch.hf.load import load_model, load_tokenizer
    from mlm_scratch.util.progress import progress_bar

    disable_progress_bar()
    tokenizer, model = load_tokenizer(name), load_model(name, "encoder").eval()
    size = BATCH_SIZE if ignores_padding(model, tokenizer) else 1
    means = []
    for start in progress_bar(range(0, len(texts), size), desc="encoding", leave=False):
        inputs = encode(model, tokenizer, texts[start : start + size], truncate=True)
        with torch.no_grad(), refusals_reported(model):
            states = model.base_model(**inputs)["last_hidden_state"]  # (B, T, H)
        check_no_nan(states)
        is_token = inputs["attention_mask"][:, :, None]  # (B, T, 1)
        means.append((states * is_token).sum(dim=1) / is_token.sum(dim=1))  # (B, H)
    return torch.cat(means)  # (N, H)


def predict(states: "Tensor", targets: "Tensor") -> "Tensor":
    """Predict each label by a regression on the other folds: (N, H), (N,) -> (N,)."""
    import torch

    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))  # (N,)
    predicted = torch.empty_like(targets)
    for held_out in order.tensor_split(FOLDS):
        rest = ~torch.isin(torch.arange(len(targets)), held_out)  # (N,)
        mean, deviation = states[rest].mean(dim=0), states[rest].std(dim=0) + 1e-6  # (H,), (H,)
        scaled = ((states - mean) / deviation).double()  # (N, H)
        weights, bias = fit_logistic(scaled[rest], targets[rest], int(targets.max()) + 1)
        predicted[held_out] = (scaled[held_out] @ weights.T + bias).argmax(dim=1)
    return predicted


def fit_logistic(
    inputs: "Tensor", targets: "Tensor", n_labels: int, penalty: float = 1.0
) -> tuple["Tensor", "Tensor"]:
    """Fit a multinomial logistic regression, in fp64: weights (labels, H), bias (labels,).

    It minimizes the summed cross-entropy plus penalty / 2 x the sum of the squared weights.
    """
    import torch
    from torch.nn.functional import cross_entropy

    weights = torch.zeros(n_labels, inputs.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(n_labels, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=1000, line_search_fn="strong_wolfe")

    def loss() -> "Tensor":
        """Return the loss, with its gradients computed."""
        optimizer.zero_grad()
        logits = inputs @ weights.T + bias  # (N, labels)
        value = cross_entropy(logits, targets, reduction="sum") + penalty / 2 * (weights**2).sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    return weights.detach(), bias.detach()


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(
        prog="-m mlm_scratch.probe",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "file", help=".csv, .tsv, .jsonl or .json with a text and a label in each row"
    )
    parser.add_argument("--models", nargs="+", metavar="NAME", help="default: the newest model")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="(text)")
    parser.add_argument("--label-column", default="label", metavar="NAME", help="(label)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command(main))
