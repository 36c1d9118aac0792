"""Whether the tutorial's model and data can be had: from the Hub, or from what is cached.

Asking must not take long where there is no network. The clients of the Hub would try for a minute
and a half; here one request has a few seconds, and after that they are told to stay offline.
"""

import logging
import os
import threading
from typing import TYPE_CHECKING

from mlm_scratch.config import BUNDLED, TUTORIAL

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TIMEOUT = 3.0  # seconds


def can_load_tutorial() -> tuple[bool, str]:
    """Whether the recipe `tutorial` can run, and how that is known."""
    if hub_answers(TUTORIAL.model):
        return True, "the Hugging Face Hub answers"
    go_offline()
    if everything_is_cached():
        return True, "the Hub does not answer, but its model and data are cached"
    return False, "no download needed; the Hub does not answer and the tutorial is not cached"


def go_offline_without_hub(*names: str) -> None:
    """If one of the models or data sets is not a local path and the Hub does not answer, take them
    from the cache or fail at once, instead of after a minute of trying."""
    if all(os.path.exists(name) or name == BUNDLED for name in names):
        return
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # one line says it all later
    if not hub_answers(TUTORIAL.model):
        go_offline()


def hub_answers(model: str, timeout: float = TIMEOUT) -> bool:
    """Whether the Hub, or what HF_ENDPOINT names, answers within `timeout` seconds when it is asked
    about a model."""
    from huggingface_hub import HfApi, is_offline_mode

    if is_offline_mode():
        return False
    answers: list[object] = []
    # A name look-up can hang, and no timeout of a client covers it: leave the thread behind then.
    asked = (HfApi(), model, timeout, answers)
    thread = threading.Thread(target=_ask, args=asked, daemon=True)
    thread.start()
    thread.join(timeout)
    return bool(answers)


def _ask(hub: "HfApi", model: str, timeout: float, answers: list[object]) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        answers.append(hub.model_info(model, timeout=timeout))
    except RepositoryNotFoundError as error:
        answers.append(error)
    except Exception:  # no route, a time-out, an error page of a proxy: all are a no
        return


def go_offline() -> None:
    """From here on this process and its children do not ask the Hub.

    Call before `datasets` is imported, which reads the environment then.
    """
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True


def everything_is_cached() -> bool:
    """Whether the tutorial's tokenizer, weights and prepared data set load without the Hub."""
    from huggingface_hub import try_to_load_from_cache

    cached = {
        name: isinstance(try_to_load_from_cache(TUTORIAL.model, name), str)  # the path, if it is
        for name in (
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "vocab.json",
            "merges.txt",
        )
    }
    # Without its vocabulary file a tokenizer loads all the same, and knows no words.
    vocabulary = cached["tokenizer.json"] or (cached["vocab.json"] and cached["merges.txt"])
    if not (cached["config.json"] and cached["model.safetensors"] and vocabulary):
        return False
    from datasets import load_dataset

    try:
        load_dataset(TUTORIAL.dataset, TUTORIAL.dataset_config, split=TUTORIAL.split)
    except (OSError, ValueError):
        return False
    return True
