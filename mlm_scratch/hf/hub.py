"""Where to get a model: from the Hub, from the cache, or from the newest run.

The answer has to come fast even without a network. The Hub's clients would retry for a minute and a
half; here a single request gets a few seconds, and if it fails, the clients are switched offline.
Does not import torch.
"""

import hashlib
import json
import logging
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from mlm_scratch.config import BUNDLED, TUTORIAL
from mlm_scratch.util.errors import UserError
from mlm_scratch.util.files import checksum
from mlm_scratch.util.runs import MANIFEST, MODEL, newest_run, newest_valid_checkpoint

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TIMEOUT = 3.0  # seconds


def newest_model() -> Path:
    """Return the model of the newest run, or the newest checkpoint if the run is unfinished.

    Raises:
        UserError: there is no run, or no valid checkpoint in it.
    """
    run = newest_run()
    if (run / MODEL).is_dir():
        return run / MODEL
    checkpoint = newest_valid_checkpoint(run) if run.is_dir() else None
    if checkpoint is None:
        raise UserError("there is no trained model yet: run python train.py, or pass --model")
    print(f"{run} is not finished: using {checkpoint.name}", file=sys.stderr)
    return checkpoint


def can_load_tutorial() -> tuple[bool, str]:
    """Whether the recipe `tutorial` can run, and why or why not."""
    if hub_answers(TUTORIAL.model.name):
        return True, "the Hugging Face Hub answers"
    go_offline()
    if everything_is_cached():
        return True, "the Hub does not answer, but its model and data are cached"
    return False, "no download needed; the Hub does not answer and the tutorial is not cached"


def go_offline_without_hub(*names: str) -> None:
    """Go offline if one of these models or data sets is not local and the Hub does not answer.

    They then come from the cache or fail immediately, instead of after a minute of retries.
    """
    if all(os.path.isabs(name) or os.path.exists(name) or name == BUNDLED for name in names):
        return
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # reported later, in one line
    if not hub_answers(TUTORIAL.model.name):
        go_offline()


def hub_answers(model: str, timeout: float = TIMEOUT) -> bool:
    """Whether the Hub, or the HF_ENDPOINT, answers a request about a model within `timeout` s."""
    from huggingface_hub import HfApi, is_offline_mode

    if is_offline_mode():
        return False
    answers: list[object] = []
    # A DNS lookup can hang, and no client's timeout covers it: if so, abandon the thread.
    arguments = (HfApi(), model, timeout, answers)
    thread = threading.Thread(target=_request, args=arguments, daemon=True)
    thread.start()
    thread.join(timeout)
    return bool(answers)


def _request(hub: "HfApi", model: str, timeout: float, answers: list[object]) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        answers.append(hub.model_info(model, timeout=timeout))
    except RepositoryNotFoundError as error:
        answers.append(error)
    except Exception:  # no route, a timeout, a proxy's error page: all count as no answer
        return


def model_commit(name: str, revision: str | None) -> str | None:
    """Return the commit of a model on the Hub, or in its cache; None for other models.

    Also None for a revision that cannot be found: loading the model reports the error.
    """
    from huggingface_hub import resolve_revision
    from huggingface_hub.errors import HfHubHTTPError, RevisionResolutionError

    if name == BUNDLED or os.path.exists(name):
        return None
    try:
        return resolve_revision(name, revision=revision).resolved
    except (HfHubHTTPError, RevisionResolutionError, ValueError, OSError):
        return None


def model_digest(name: str) -> str | None:
    """Digest configuration, tokenizer and weights of a directory; None for other models."""
    if name == BUNDLED:
        return None
    suffixes = {".json", ".txt", ".model", ".safetensors", ".bin"}
    files = sorted(path for path in Path(name).glob("*") if path.suffix in suffixes)
    contents = {path.name: checksum(path) for path in files if path.name != MANIFEST}
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest() if contents else None


def why_not_found(kind: str, name: str, error: BaseException | None) -> str | None:
    """Explain that nothing has this name, neither here nor on the Hub; None: it is something else.

    Args:
        kind: "model" or "data set".
        name: as typed.
        error: what a library raised for it.
    """
    from huggingface_hub import is_offline_mode
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if os.path.exists(name):
        return None
    reason = f"there is no directory {name}"
    try:
        validate_repo_id(name)
    except HFValidationError:  # no name on the Hub looks like that
        return reason
    if is_offline_mode():
        return f"{reason}, the Hub does not answer, and no {kind} of that name is cached completely"
    while error is not None:
        if type(error).__name__ in ("RepositoryNotFoundError", "DatasetNotFoundError"):
            return f"{reason}, and the Hub has no {kind} of that name, or a private one"
        error = error.__cause__ or error.__context__
    return None


def go_offline() -> None:
    """Keep this process and its children from contacting the Hub from now on.

    Call this before importing `datasets`, which reads the environment only once.
    """
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True


def everything_is_cached() -> bool:
    """Whether the tutorial's tokenizer, weights and prepared data set load without the Hub."""
    from huggingface_hub import try_to_load_from_cache

    cached = {
        name: isinstance(try_to_load_from_cache(TUTORIAL.model.name, name), str)  # a path if cached
        for name in (
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "vocab.json",
            "merges.txt",
        )
    }
    # A tokenizer loads without its vocabulary file, too, but then has no words.
    vocabulary = cached["tokenizer.json"] or (cached["vocab.json"] and cached["merges.txt"])
    if not (cached["config.json"] and cached["model.safetensors"] and vocabulary):
        return False
    from datasets import load_dataset

    text = TUTORIAL.text

    try:
        load_dataset(text.dataset, text.dataset_config, split=text.split)
    except (OSError, ValueError):
        return False
    return True
