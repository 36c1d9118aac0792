"""Turn the tables of facts into rows that look like ELI5 questions with their answers.

    from datasets import Dataset
    dataset = Dataset.from_list(rows())     # column answers.text: a list of short answers

Every fact is stated in every phrasing of its table except one, equally often, in random order. Most
rows have one answer of one sentence: later prompts look just like these rows, and there is nothing
to copy the masked word from, so the model must remember it.
"""

import random
import re
from collections.abc import Iterator

from mlm_scratch.data.corpus.facts import TABLES, Table

REPEATS = 26  # how often each sentence answers first; training time is proportional to it
SECOND_ANSWER = 1 / 8  # share of the questions that have a second answer
SEED = 0


def fill(template: str, table: Table, fact: tuple[str, ...]) -> str:
    """Put the values of one fact into a phrasing or question, with a capital letter in front."""
    text = template.format(**dict(zip(table.columns, fact, strict=True)))
    return re.sub(r"\w", lambda first: first[0].upper(), text, count=1)


def held_out(table: Table, fact_number: int) -> int:
    """Return the number of the one phrasing that the corpus never uses for this fact.

    A model that fills the mask in such a sentence has learned the fact independently of the
    phrasing: it has seen the fact in other phrasings and the phrasing with other facts, but never
    this sentence.
    """
    return fact_number % len(table.phrasings)


def numbered_facts() -> Iterator[tuple[Table, int, tuple[str, ...]]]:
    """Yield (table, number of the fact in it, fact) of each fact."""
    for table in TABLES:
        for number, fact in enumerate(table.facts):
            yield table, number, fact


def explanations() -> Iterator[tuple[str, str, list[str]]]:
    """Yield (category, question, answers) of each fact: all its phrasings but the held-out one."""
    for table, number, fact in numbered_facts():
        answers = [fill(phrasing, table, fact) for phrasing in table.phrasings]
        del answers[held_out(table, number)]
        yield table.category, fill(table.question, table, fact), answers


def unseen_sentences() -> Iterator[tuple[str, str]]:
    """Yield (sentence, answer) of each fact in the one phrasing that the corpus never uses."""
    for table, number, fact in numbered_facts():
        yield fill(table.phrasings[held_out(table, number)], table, fact), fact[-1]


def unseen_prompts(chose: bool) -> Iterator[str]:
    """Yield the unseen sentences of half of the facts, each with its answer in brackets.

    Args:
        chose: the half by which the recipe was chosen, every other fact of a table from the first
            on; or the other half, which reports.
    """
    for table, number, fact in numbered_facts():
        if (number % 2 == 0) == chose:
            bracketed = (*fact[:-1], f"[{fact[-1]}]")
            yield fill(table.phrasings[held_out(table, number)], table, bracketed)


def rows(repeats: int = REPEATS, seed: int = SEED) -> list[dict]:
    """Return the corpus in the schema of `eli5_category`, always the same for equal arguments."""
    rng = random.Random(seed)
    stated = []
    for category, question, answers in explanations():
        for answer in answers * repeats:
            more = [rng.choice(answers)] if rng.random() < SECOND_ANSWER else []
            stated.append((category, question, [answer, *more]))
    rng.shuffle(stated)
    return [
        {
            "q_id": f"q{number:06d}",
            "title": question,
            "selftext": "",
            "category": category,
            "subreddit": "explainlikeimfive",
            "answers": {
                "a_id": [f"a{number:06d}{letter}" for letter in "ab"[: len(answers)]],
                "text": answers,
                "score": [*range(len(answers), 0, -1)],
                "text_urls": [[] for _ in answers],
            },
            "title_urls": [],
            "selftext_urls": [],
        }
        for number, (category, question, answers) in enumerate(stated)
    ]
