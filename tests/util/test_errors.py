"""Which errors are the user's, and which are the project's own and keep their traceback."""

import sys

import pytest

import infer
import train
from mlm_scratch.data.documents import Documents
from mlm_scratch.inference import fill
from mlm_scratch.util.errors import first_line, is_own_fault
from tests.support.tiny import small_flags

FAULTS = [AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError]


def raise_in(module, error):
    """A function of this module that raises."""
    source = "def broken(*args, **kwargs):\n    raise error('x')"
    names = {"error": error}
    exec(compile(source, module.__file__, "exec"), names)
    return names["broken"]


@pytest.mark.parametrize("error", FAULTS)
def test_a_mistake_of_this_project_is_no_error_of_the_user(files, call, monkeypatch, error):
    """In what reads texts, and in what runs a model: both report what libraries raise there."""
    monkeypatch.setattr(fill.chapter, "fill_mask", raise_in(fill.chapter, error))
    with pytest.raises(error):
        call(infer, "--model", files / "model", "A <mask>.")
    monkeypatch.setattr(Documents, "_pick", raise_in(sys.modules[Documents.__module__], error))
    with pytest.raises(error):
        call(train, *small_flags(files), "--max-steps", 1)


@pytest.mark.parametrize("error", FAULTS)
def test_what_a_library_raises_is_reported_in_one_line(files, call, monkeypatch, error):
    import transformers

    raising = raise_in(transformers, error)
    monkeypatch.setattr("transformers.RobertaForMaskedLM.forward", raising)
    code, _, err = call(infer, "--model", files / "model", "A <mask>.")
    assert code == 2 and "the model cannot take this text" in err


def test_an_error_without_a_traceback_is_nobodys():
    assert not is_own_fault(ValueError("never raised"))


def test_a_message_that_announces_a_list_is_not_cut_at_the_colon():
    assert first_line(ValueError("one of: \n(1) a\n(2) b")) == "one of: (1) a (2) b"
    assert first_line(ValueError("first\nsecond")) == "first"
    assert first_line(ValueError()) == "ValueError"
