"""report.html: well formed, complete, and alone."""

import json
import re
from html.parser import HTMLParser

import pytest

from mlm_scratch.report.metrics import read_metrics
from mlm_scratch.report.page import ticks
from mlm_scratch.run.session import train
from tests.support.tiny import small_config

VOID = {"meta"}


class Page(HTMLParser):
    """The elements of a page, each with its text; what is opened has to be closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.links = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append([tag, dict(attributes), ""])
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(self.found[-1])

    def handle_startendtag(self, tag, attributes):
        self.found.append([tag, dict(attributes), ""])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def of(self, tag):
        return [(attributes, text) for name, attributes, text in self.found if name == tag]


def test_the_page_shows_the_run(files):
    watch = ("Paris is the [capital] of France.", "A & <mask> <b>")
    settings = {"watch": watch, "eval_fraction": 0.2, "eval_every": 4, "max_steps": 12}
    run_dir = train(small_config(files, log_every=3, **settings))
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    page, lines = Page(text), read_metrics(run_dir)
    assert page.links == [] and "http" not in text and "<script" not in text
    training, evaluation, *answers = [
        attributes["points"].split() for attributes, _ in page.of("polyline")
    ]
    assert len(training) == 4 and len(evaluation) == 4 and [len(a) for a in answers] == [4, 4]
    titles = [text for _, text in page.of("title")]
    for line in lines:
        if "eval_loss" in line:
            assert f"step {line['step']}: evaluation {line['eval_loss']:.4g}" in titles
    cells = [text for _, text in page.of("td")]
    assert "A & <mask> <b>" in cells  # escaped, and not taken for markup
    bars = [a["style"] for a, _ in page.of("div") if "height" in a.get("style", "")]
    heights = [float(re.search(r"height:([\d.]+)", style)[1]) / 2.5 for style in bars]
    fills = [
        fill for n in (0, 1) for line in lines if "watch" in line for fill in line["watch"][n:][:1]
    ]
    assert heights == pytest.approx([f.get("answer_p", f["p"]) for f in fills], abs=0.005)
    listed = dict(zip(*([text for _, text in page.of(tag)] for tag in ("dt", "dd")), strict=True))
    assert listed["max-steps"] == "12" and listed["whole-word"] == "False"
    pre = [text for _, text in page.of("pre")]
    assert "model sees" in pre[0] and pre[1].startswith("python train.py --recipe tutorial")
    results = json.loads((run_dir / "results.json").read_text())
    assert f"{results['after']['perplexity']:.2f}" in page.of("p")[0][1]


def test_a_run_that_logs_nothing_has_a_page_too(files):
    run_dir = train(small_config(files, max_steps=1))
    page = Page((run_dir / "report.html").read_text(encoding="utf-8"))
    assert "nothing was logged" in [text for _, text in page.of("p")]


@pytest.mark.parametrize(
    "top, expected",
    [
        (1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (7.94, [0, 2, 4, 6]),
        (1960, [0, 500, 1000, 1500]),
        (1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0031, [0, 0.001, 0.002, 0.003]),
    ],
)
def test_ticks_are_round(top, expected):
    assert ticks(top) == pytest.approx(expected)
