"""Right solutions in other ways than the chapters', and the mistakes that people make in them.

A mistake is a part of a solution's text, what stands in its place, and the rule that it breaks.
"""

SOLUTIONS = {
    "masking": """
import torch

def mask_tokens(input_ids, special_tokens_mask, *, mask_token_id, vocab_size,
                mlm_probability=0.15, mask_replace_prob=0.8, random_replace_prob=0.1,
                word_ids=None, generator=None):
    B, T = input_ids.shape
    outside = special_tokens_mask.bool()
    unit = torch.arange(T).expand(B, T)
    if word_ids is not None:
        outside, unit = outside | (word_ids == -1), word_ids.clamp(min=0)
    size = (B, T + 1)
    treat = torch.rand(size, generator=generator).gather(1, unit)
    selected = torch.rand(size, generator=generator).gather(1, unit) < mlm_probability
    selected = selected & ~outside
    labels = torch.where(selected, input_ids, -100)
    seen = input_ids.clone()
    seen[selected & (treat < mask_replace_prob)] = mask_token_id
    limit = mask_replace_prob + random_replace_prob
    randomized = selected & (treat >= mask_replace_prob) & (treat < limit)
    ids = torch.randint(vocab_size, (B, T), generator=generator)
    seen[randomized] = ids[randomized]
    return seen, labels
""",
    "loader": """
import numpy as np
import torch

def pad(rows, pad_token_id):
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_token_id)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return ids, mask

def epoch_order(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)
""",
    "model": """
import torch

def masked_lm_loss(logits, labels):
    log_p = logits.float().log_softmax(dim=-1)
    has_label = labels != -100
    picked = log_p.gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return -(picked * has_label).sum() / has_label.sum()

def sparse_loss(hidden, head, labels):
    has_label = labels != -100
    logits = head(hidden[has_label])
    return masked_lm_loss(logits[None], labels[has_label][None])
""",
    "optim": """
from torch import nn

def parameter_groups(model, weight_decay):
    spared = set()
    for name, module in model.named_modules():
        own = name.lower().split(".")[-1]
        is_norm = isinstance(module, nn.LayerNorm) or own.endswith("norm")
        for kind, parameter in module.named_parameters(recurse=False):
            if is_norm or kind == "bias":
                spared.add(parameter)
    every = list(model.parameters())
    return [
        {"params": [p for p in every if p in spared], "weight_decay": 0.0},
        {"params": [p for p in every if p not in spared], "weight_decay": weight_decay},
    ]

def linear(step, total_steps, warmup_steps):
    if step < warmup_steps:
        return step / warmup_steps
    left = max(0, total_steps - step)
    return left / max(1, total_steps - warmup_steps)
""",
    "loop": """
from contextlib import nullcontext
import torch

def train_step(model, optimizer, scheduler, scaler, step, *, autocast=nullcontext,
               max_grad_norm=1.0):
    before = scaler.get_scale()
    total = torch.zeros(())
    for batch in step.batches:
        with autocast():
            loss = model(batch)
        loss = loss / max(1, step.n_masked)
        scaler.scale(loss).backward()
        total += loss.detach()
    if step.n_masked == 0:
        optimizer.zero_grad()
        return total, torch.zeros(())
    scaler.unscale_(optimizer)
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    for p in parameters:
        p.grad *= min(1.0, max_grad_norm / (norm.item() + 1e-6))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=False)
    if scaler.get_scale() >= before:
        scheduler.step()
    return total, norm
""",
    "fill_mask": """
import torch

@torch.no_grad()
def fill_mask(model, tokenizer, text, top_k=5, targets=None):
    was_training = model.training
    model.eval()
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    p = model(input_ids=ids).logits[0].softmax(dim=-1)
    model.train(was_training)
    masks = [at for at, id in enumerate(ids[0].tolist()) if id == tokenizer.mask_token_id]
    every = range(p.shape[1]) if targets is None else tokenizer.convert_tokens_to_ids(targets)
    found = []
    for at in masks:
        best = sorted(every, key=lambda id: -p[at, id].item())[:top_k]
        fills = []
        for id in best:
            filled = ids[0].clone()
            filled[at] = id
            sequence = tokenizer.decode(filled, skip_special_tokens=len(masks) == 1)
            score = p[at, id].item()
            fills.append({"score": score, "token": id, "token_str": tokenizer.decode([id]),
                          "sequence": sequence})
        found.append(fills)
    return found[0] if len(masks) == 1 else found
""",
}

LABELS = "labels are the original ids, -100 where nothing is selected"
TREATMENT = "80 % become the mask token, 10 % a random one, 10 % stay"
INDEPENDENT = "rows, positions and calls are independent"
SUM_UP = "batches of a step add up to one large batch"
MISTAKES = [
    (
        "masking",
        "return seen, labels",
        "return seen, labels != -100",
        "two (B, T) int64 tensors come back",
    ),
    (
        "masking",
        "seen = input_ids.clone()",
        "seen = input_ids",
        "the caller's tensors stay as they are",
    ),
    ("masking", "selected = selected & ~outside", "pass", "special tokens are never selected"),
    (
        "masking",
        "special_tokens_mask.bool()",
        "special_tokens_mask.bool() & (torch.arange(T) < T - 1)",
        "special tokens are never selected",
    ),
    ("masking", "torch.where(selected, input_ids, -100)", "input_ids.clone()", LABELS),
    ("masking", "torch.where(selected, input_ids, -100)", "input_ids * selected", LABELS),
    (
        "masking",
        "return seen, labels",
        "return seen, torch.where(seen != input_ids, input_ids, -100)",
        LABELS,
    ),
    (
        "masking",
        "< mlm_probability",
        "< 0.16 / 0.15 * mlm_probability",
        "mlm_probability of the tokens are selected",
    ),
    (
        "masking",
        "selected = selected & ~outside",
        """
    draws = torch.rand((B, T), generator=generator).masked_fill(outside, 2.0)
    n = (mlm_probability * (~outside).sum(1)).round().long()
    selected = draws.argsort(1).argsort(1) < n[:, None]""",
        "each token is selected by itself, not a fixed number per row",
    ),
    # 81/10/9
    (
        "masking",
        "selected = selected & ~outside",
        "selected = selected & ~outside; mask_replace_prob *= 1.0125",
        TREATMENT,
    ),
    # 80/2/18: the random share taken of what is left
    (
        "masking",
        "limit = mask_replace_prob + random_replace_prob",
        "limit = mask_replace_prob + (1 - mask_replace_prob) * random_replace_prob",
        TREATMENT,
    ),
    (
        "masking",
        "torch.randint(vocab_size",
        "torch.randint(5, vocab_size",
        "random ids come from the whole vocabulary",
    ),
    (
        "masking",
        "torch.randint(vocab_size",
        "torch.randint(vocab_size - 1",
        "random ids come from the whole vocabulary",
    ),
    # one mask for all rows
    (
        "masking",
        "torch.rand(size, generator=generator).gather(1, unit) < mlm",
        "torch.rand(size, generator=generator)[:1].expand(size).gather(1, unit) < mlm",
        INDEPENDENT,
    ),
    # one mask for all calls
    (
        "masking",
        "B, T = input_ids.shape",
        "B, T = input_ids.shape; generator = torch.Generator().manual_seed(0)",
        INDEPENDENT,
    ),
    # spans of two
    (
        "masking",
        "unit = torch.arange(T).expand(B, T)",
        "unit = (torch.arange(T) // 2).expand(B, T)",
        INDEPENDENT,
    ),
    (
        "masking",
        "(B, T), generator=generator)",
        "(B, T))",
        "all randomness comes from the generator",
    ),
    (
        "masking",
        "if word_ids is not None:",
        "if False:",
        "with word_ids, the tokens of a word share their fate",
    ),
    (
        "masking",
        "treat = torch.rand(size, generator=generator).gather(1, unit)",
        "treat = torch.rand((B, T), generator=generator)",
        "with word_ids, the tokens of a word share their fate",
    ),
    ("loader", "width = max(map(len, rows))", "width = 8", "a batch is as wide as its longest row"),
    (
        "loader",
        "ids[number, : len(row)] =",
        "ids[number, width - len(row) :] =",
        "each row stands at the left, padding fills its right",
    ),
    (
        "loader",
        "return ids, mask",
        "return ids, 1 - mask",
        "attention_mask is 1 at tokens and 0 at padding",
    ),
    (
        "loader",
        "return ids, mask",
        "return ids, (ids != pad_token_id).long()",
        "a token that has the padding's id is still a token",
    ),
    (
        "loader",
        "    for number, row",
        "    rows[0].append(pad_token_id)\n    rows[0].pop(0)\n    for number, row",
        "the caller's rows stay as they are",
    ),
    ("loader", ".permutation(n)", ".integers(n, size=n)", "each row comes once in an epoch"),
    (
        "loader",
        "default_rng((seed, epoch))",
        "default_rng()",
        "equal seed and epoch give the same order",
    ),
    (
        "loader",
        "default_rng((seed, epoch))",
        "default_rng(seed)",
        "another epoch, or seed, has another order",
    ),
    (
        "loader",
        "default_rng((seed, epoch))",
        "default_rng(epoch)",
        "another epoch, or seed, has another order",
    ),
    ("loader", ".permutation(n)", ".integers(n) + np.arange(n)", "each row comes once in an epoch"),
    (
        "loader",
        "return np.random.default_rng((seed, epoch)).permutation(n)",
        "return np.roll(np.arange(n), np.random.default_rng((seed, epoch)).integers(n))",
        "all orders are equally likely",
    ),
    ("model", "-(picked", "(picked", "the loss is that of cross_entropy"),
    ("model", "(picked * has_label)", "picked", "tokens without a label do not count"),
    (
        "model",
        "/ has_label.sum()",
        "/ labels.numel()",
        "the mean is over masked tokens, not over rows or all tokens",
    ),
    (
        "model",
        "logits.float().log_softmax(dim=-1)",
        "logits.float().softmax(dim=-1).log()",
        "large logits do not overflow",
    ),
    ("model", "logits.float()", "logits", "half-precision logits are summed in fp32"),
    ("model", "logits.float()", "logits.detach().float()", "the gradient is that of cross_entropy"),
    (
        "model",
        "labels[has_label][None]",
        "labels[has_label].flip(0)[None]",
        "on masked positions only, the loss is the same",
    ),
    (
        "model",
        "head(hidden[has_label])",
        "head(hidden)[has_label]",
        "the head sees masked positions only",
    ),
    (
        "model",
        "head(hidden[has_label])",
        "head(hidden[has_label].detach())",
        "its gradients are the same, too",
    ),
    (
        "optim",
        "every = list(model.parameters())",
        "every = [p for m in model.modules() for p in m.parameters(recurse=False)]",
        "each parameter is in one group, shared ones once",
    ),
    (
        "optim",
        'kind == "bias"',
        'kind == "bias" or "norm" in name',
        "weight matrices and embeddings decay",
    ),
    ("optim", ' or kind == "bias"', "", "biases do not decay"),
    (
        "optim",
        "isinstance(module, nn.LayerNorm) or ",
        "",
        "norms do not decay, whatever their name",
    ),
    ("optim", ' or own.endswith("norm")', "", "nor do norms of other classes that are called so"),
    (
        "optim",
        "left = max(0, total_steps - step)",
        "left = max(0, total_steps - step - 1)",
        "without a warm-up the rate falls from 1 to 0",
    ),
    (
        "optim",
        "return step / warmup_steps",
        "return (step + 1) / warmup_steps",
        "a warm-up rises from 0, one step after the other",
    ),
    (
        "optim",
        "max(1, total_steps - warmup_steps)",
        "total_steps",
        "after the warm-up it falls to 0 over the steps that are left",
    ),
    (
        "optim",
        "max(1, total_steps - warmup_steps)",
        "(total_steps - warmup_steps)",
        "a warm-up as long as the run, or longer, divides by no zero",
    ),
    (
        "loop",
        "total += loss.detach()",
        "total = loss.detach()",
        "the loss is the mean over the masked tokens of the step",
    ),
    ("loop", "scaler.step(optimizer)", "pass", "one batch is one step of plain training"),
    ("loop", "max(1, step.n_masked)", "len(batch.positions) / len(step.batches)", SUM_UP),
    ("loop", "max(1, step.n_masked)", "max(1, len(batch.positions))", SUM_UP),
    (
        "loop",
        "        with autocast():\n            loss = model(batch)\n",
        "        loss = model(batch)\n",
        "each forward pass is within autocast()",
    ),
    (
        "loop",
        "return total, norm",
        "return total, norm.clamp(max=max_grad_norm)",
        "the norm is measured before clipping",
    ),
    (
        "loop",
        "p.grad *= min(1.0, max_grad_norm / (norm.item() + 1e-6))",
        "pass",
        "gradients are clipped to max_grad_norm",
    ),
    (
        "loop",
        "    scaler.unscale_(optimizer)\n",
        "",
        "gradients are unscaled before their norm is measured and clipped",
    ),
    (
        "loop",
        "    optimizer.zero_grad(set_to_none=False)\n",
        "",
        "gradients are cleared between steps",
    ),
    (
        "loop",
        "    scaler.step(optimizer)\n",
        "    scheduler.step()\n    scaler.step(optimizer)\n",
        "the schedule moves on once per step",
    ),
    (
        "loop",
        "    scaler.step(optimizer)\n",
        "    optimizer.step()\n",
        "a step with infinite gradients changes no weight and halves the scale",
    ),
    (
        "loop",
        "if scaler.get_scale() >= before:",
        "if True:",
        "a skipped step does not count for the schedule",
    ),
    (
        "loop",
        "if step.n_masked == 0:",
        "if False:",
        "a step without masked tokens changes no weight",
    ),
    (
        "fill_mask",
        "key=lambda id: -p[at, id].item()",
        "key=lambda id: p[at, id].item()",
        "the best fills come first, as many as top_k",
    ),
    (
        "fill_mask",
        ".logits[0].softmax(dim=-1)",
        ".logits[0].sigmoid()",
        "a score is a probability over the whole vocabulary",
    ),
    (
        "fill_mask",
        "skip_special_tokens=len(masks) == 1",
        "skip_special_tokens=False",
        "a fill has token_str, and the sequence with it in place",
    ),
    ("fill_mask", "    model.eval()\n", "", "the model runs without dropout, and keeps its mode"),
    (
        "fill_mask",
        "    model.train(was_training)\n",
        "",
        "the model runs without dropout, and keeps its mode",
    ),
    (
        "fill_mask",
        "return found[0] if len(masks) == 1 else found",
        "return found[0]",
        "several masks give a list for each",
    ),
    (
        "fill_mask",
        "skip_special_tokens=len(masks) == 1",
        "skip_special_tokens=True",
        "several masks give a list for each",
    ),
    (
        "fill_mask",
        "if targets is None else",
        "if True else",
        "targets alone are considered, in the order of their scores",
    ),
    (
        "fill_mask",
        "score = p[at, id].item()",
        "score = p[at, id].item() / (sum(p[at, t].item() for t in every) if targets else 1)",
        "scores of targets are not renormalised",
    ),
    # one draw for both decisions: at 15 % all become the mask
    (
        "masking",
        "selected = torch.rand(size, generator=generator).gather(1, unit) < mlm_probability",
        "selected = treat < mlm_probability",
        TREATMENT,
    ),
    # random ids from the draw that decided on them
    (
        "masking",
        "ids = torch.randint(vocab_size, (B, T), generator=generator)",
        "ids = (treat * vocab_size).long()",
        "random ids come from the whole vocabulary",
    ),
    (
        "masking",
        "outside, unit = outside | (word_ids == -1), word_ids.clamp(min=0)",
        "unit = word_ids.clamp(min=0)",
        "with word_ids, the tokens of a word share their fate",
    ),
    (
        "masking",
        "outside, unit = outside | (word_ids == -1), word_ids.clamp(min=0)",
        "outside, unit = (word_ids == -1), word_ids.clamp(min=0)",
        "with word_ids, the tokens of a word share their fate",
    ),
    (
        "masking",
        "    size = (B, T + 1)\n",
        "    if word_ids is not None: mask_replace_prob, random_replace_prob = 1.0, 0.0\n"
        "    size = (B, T + 1)\n",
        "words, too, are drawn for each row, and treated 80/10/10",
    ),
    (
        "masking",
        "    size = (B, T + 1)\n    treat = torch.rand(size, generator=generator).gather(1, unit)\n"
        "    selected = torch.rand(size, generator=generator)",
        "    size = (B, T + 1)\n    treat = torch.rand(size, generator=generator).gather(1, unit)\n"
        "    shared = size if word_ids is None else (1, T + 1)\n"
        "    selected = torch.rand(shared, generator=generator).expand(size)",
        "words, too, are drawn for each row, and treated 80/10/10",
    ),
    (
        "loader",
        "return np.random.default_rng((seed, epoch)).permutation(n)",
        "np.random.seed(seed * 1000 % 2**32 + epoch); return np.random.permutation(n)",
        "equal seed and epoch give the same order",
    ),
    (
        "loader",
        "return np.random.default_rng((seed, epoch)).permutation(n)",
        "return np.roll(np.random.default_rng(seed).permutation(n), epoch)",
        "all orders are equally likely",
    ),
    # a shuffle that swaps each row with any, not with a later one
    (
        "loader",
        "    return np.random.default_rng((seed, epoch)).permutation(n)",
        """    r, order = np.random.default_rng((seed, epoch)), list(range(n))
    for i, j in enumerate(r.integers(n, size=n)):
        order[i], order[j] = order[j], order[i]
    return order""",
        "all orders are equally likely",
    ),
    (
        "optim",
        "return left / max(1, total_steps - warmup_steps)",
        "return left / max(1, total_steps - warmup_steps) if total_steps > 3 else float('nan')",
        "without a warm-up the rate falls from 1 to 0",
    ),
    (
        "optim",
        '"weight_decay": weight_decay}',
        '"weight_decay": 0.1}',
        "weight matrices and embeddings decay",
    ),
    (
        "loop",
        "if scaler.get_scale() >= before:",
        "if scaler.get_scale() == before:",
        "the schedule moves on once per step",
    ),
    (
        "loop",
        "loss = loss / max(1, step.n_masked)",
        "loss = loss / max(1, sum(len(b.positions) for b in step.batches))",
        "the loss is the mean over the masked tokens of the step",
    ),
    (
        "fill_mask",
        "best = sorted(every, key=lambda id: -p[at, id].item())[:top_k]",
        """best = sorted(every, key=lambda id: -p[at, id].item())[:top_k]
        if targets: best = every[:top_k]""",
        "targets alone are considered, in the order of their scores",
    ),
]
