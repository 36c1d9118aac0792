"""The bundled corpus: deterministic, in the ELI5 schema, and consistent with the prompts."""

import re
from collections import Counter

import pytest
from datasets import Dataset

from mlm_scratch.config import WATCHED, resolve
from mlm_scratch.data.corpus import rows
from mlm_scratch.data.corpus.facts import TABLES
from mlm_scratch.data.corpus.generate import REPEATS, explanations, fill
from mlm_scratch.data.documents import MASKINGS, load_documents
from tests.support.fact_prompts import EMITTED, NEVER_EMITTED
from tests.support.tiny import write_text


@pytest.fixture(scope="module")
def corpus():
    return rows()


def test_the_corpus_is_deterministic(corpus):
    assert rows() == corpus
    assert rows(repeats=1, seed=1) != rows(repeats=1)


def test_rows_follow_the_eli5_schema(corpus):
    dataset = Dataset.from_list(corpus)
    assert dataset.column_names == [
        "q_id",
        "title",
        "selftext",
        "category",
        "subreddit",
        "answers",
        "title_urls",
        "selftext_urls",
    ]
    assert len(set(dataset["q_id"])) == len(corpus)
    for row in corpus:
        answers = row["answers"]
        assert set(answers) == {"a_id", "text", "score", "text_urls"}
        assert len({len(values) for values in answers.values()}) == 1  # one of each per answer
        assert all(answers["text"]) and row["title"].endswith("?")


def test_every_fact_occurs_equally_often_in_all_phrasings_but_one(corpus):
    count = Counter(text for row in corpus for text in row["answers"]["text"])
    first = Counter(row["answers"]["text"][0] for row in corpus)
    assert set(first.values()) == {REPEATS} and first.keys() == count.keys()
    for table in TABLES:
        for fact in table.facts:
            sentences = {fill(phrasing, table, fact) for phrasing in table.phrasings}
            assert len(sentences - count.keys()) == 1, f"{fact}: one phrasing has to be withheld"


def test_no_phrasing_contains_the_answer_twice():
    for table in TABLES:
        answer = "{" + table.columns[-1] + "}"
        assert all(phrasing.count(answer) == 1 for phrasing in table.phrasings)


def test_prompts_occur_or_not_as_their_list_says(corpus):
    text = "\n".join(" ".join(row["answers"]["text"]) for row in corpus)
    for prompt, answer in EMITTED:
        assert prompt.replace("<mask>", answer) in text, prompt
    for prompt, answer in NEVER_EMITTED:
        assert prompt.replace("<mask>", answer) not in text, prompt
    assert len(EMITTED) + len(NEVER_EMITTED) >= 120 and len(NEVER_EMITTED) >= 40


@pytest.mark.slow
def test_what_is_held_out_is_in_no_document():
    """Not a sentence of it; and the facts that report are not those that chose the recipe."""
    documents, held_out = load_documents(resolve("bundled", {}))
    text = "\n".join(documents)
    sentences = Counter(held_out)
    assert len(sentences) == 205 and set(sentences.values()) == {MASKINGS}
    assert not [sentence for sentence in sentences if sentence in text]
    asked = {group: {*prompts} for group, prompts in held_out.answers.items()}
    whole = [re.sub(r"[][]", "", prompt) for prompts in asked.values() for prompt in prompts]
    assert Counter(whole) == Counter(dict.fromkeys(sentences, 1))
    chose = {re.sub(r"\[.*\]", "<mask>", prompt) for prompt in asked["choosing"]}
    reports = {re.sub(r"\[.*\]", "<mask>", prompt) for prompt in asked["reporting"]}
    assert sum(prompt in chose for prompt, _ in NEVER_EMITTED) >= 38
    assert not [prompt for prompt, _ in NEVER_EMITTED if prompt in reports]
    assert set(WATCHED) & asked["reporting"]


@pytest.mark.slow
def test_a_fraction_or_a_file_that_is_named_is_evaluated_on(tmp_path):
    write_text(tmp_path / "a.txt")
    file = (str(tmp_path / "a.txt"),)
    for given in ({"eval_fraction": 0.1}, {"eval_file": file}, {"train_file": file}):
        _, evaluation = load_documents(resolve("bundled", given))
        assert evaluation.answers == {} and evaluation.held_out == ("eval_file" not in given)
    assert load_documents(resolve("bundled", {"eval_fraction": 0}))[1] is None


def test_a_prompt_has_one_answer():
    """No two sentences of the corpus, and no two prompts, differ in the masked word alone."""
    prompts = [prompt for prompt, _ in EMITTED + NEVER_EMITTED]
    assert len(prompts) == len(set(prompts))
    emitted = [answer.split() for _, _, answers in explanations() for answer in answers]
    for prompt, answer in EMITTED + NEVER_EMITTED:
        before, after = prompt.split("<mask>")
        fills = {
            words[len(before.split())]
            for words in emitted
            if len(words) == len(prompt.split())
            and " ".join(words).startswith(before)
            and " ".join(words).endswith(after)
        }
        assert {word.strip(".,") for word in fills} <= {answer}, prompt
