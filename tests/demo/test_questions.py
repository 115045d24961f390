"""The questions: enough of them, about enough modules, and about modules that the corpus has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from examples.demo.corpus import Passage
from examples.demo.questions import QUESTIONS


def test_enough_questions_and_none_twice() -> None:
    assert len(QUESTIONS) >= 48
    assert len({question.text for question in QUESTIONS}) == len(QUESTIONS)
    assert all(question.modules for question in QUESTIONS)


def test_the_corpus_can_answer_them(passages: Sequence[Passage]) -> None:
    """Some interpreters come without a module or two (no tkinter, no ensurepip), but not without many."""
    counts = Counter(passage.package for passage in passages)
    missing = [question.text for question in QUESTIONS if not any(counts[module] for module in question.modules)]
    assert len(missing) <= 4, missing
    plenty = {module for question in QUESTIONS for module in question.modules if counts[module] >= 10}
    assert len(plenty) >= 16
