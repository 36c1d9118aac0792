"""The row that a run shows before its first step."""

import re

from mlm_scratch.hf.load import load_tokenizer
from mlm_scratch.model import MaskedLM
from mlm_scratch.run.session import train
from tests.support.tiny import SENTENCES, small_config, write_text


def test_a_run_shows_its_first_row_as_the_model_sees_it(files, tmp_path, monkeypatch, capsys):
    forward, rows = MaskedLM.forward, []

    def noted(model, batch):
        rows.append((batch.input_ids[0].tolist(), batch.labels[0].tolist()))
        return forward(model, batch)

    monkeypatch.setattr(MaskedLM, "forward", noted)
    write_text(tmp_path / "a.txt", SENTENCES[1:2])  # a step of one row
    settings = {"grouping": "lines", "block_size": 64, "max_steps": 1, "mlm_probability": 0.5}
    train(small_config(files, train_file=(str(tmp_path / "a.txt"),), seed=1, **settings))
    out, tokenizer = capsys.readouterr().out, load_tokenizer(files / "model")
    input_ids, labels = rows[0]
    for name, ids in (("model sees", input_ids), ("label", labels)):
        shown = re.search(rf"^  {name} +(.*)$", out, re.M)[1].split()
        assert shown == [
            "·" if id == -100 else tokenizer.convert_ids_to_tokens(id) for id in ids[:12]
        ]
