"""Three sentences that the bundled corpus does not contain, predicted at the end of its run."""

from collections.abc import Iterator
from pathlib import Path

from mlm_scratch.data.corpus import unseen_sentences
from mlm_scratch.fill_mask import fill_mask
from mlm_scratch.hf.checks import longest_input
from mlm_scratch.hf.load import load_model, load_tokenizer


def unseen_lines(model_dir: Path) -> Iterator[str]:
    """Yield the predictions for three facts that the corpus states only in other words.

    Of the facts whose answer is one token after a space, take the first, middle and last: the
    choice does not depend on the predictions. Yield nothing if there are fewer than three.
    """
    tokenizer, model = load_tokenizer(model_dir), load_model(model_dir)
    prompts = []
    for sentence, answer in unseen_sentences():
        masked = sentence.replace(f" {answer}", f" {tokenizer.mask_token}")
        ids, masked_ids = tokenizer([sentence, masked], verbose=False)["input_ids"]
        differing = [id for id, seen in zip(ids, masked_ids, strict=False) if id != seen]
        one_token = len(ids) == len(masked_ids) and len(differing) == 1
        one_token = one_token and differing[0] != tokenizer.unk_token_id
        if one_token and len(ids) <= longest_input(tokenizer, model):
            prompts.append((masked, answer, differing[0]))
    if len(prompts) < 3:
        return
    yield "three sentences that were not in the text:"
    for masked, answer, id in (prompts[0], prompts[len(prompts) // 2], prompts[-1]):
        best = fill_mask(model, tokenizer, masked, top_k=1)[0]
        verdict = "right" if best["token"] == id else f"wrong, it is {answer}"
        yield f"    {masked}  {best['token_str'].strip()} ({best['score']:.2f}): {verdict}"
