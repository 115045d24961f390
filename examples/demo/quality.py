"""How good recalled passages are: beside exact nearest-neighbour search on the same vectors.

Does not know where they were recalled from, nor what is printed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from examples.demo.corpus import Passage
from examples.demo.embedder import Floats
from examples.demo.questions import Question

MIN_FOUND = 0.9
MAX_HITS_BELOW_EXACT = 0.05


@dataclass(frozen=True, slots=True)
class Quality:
    """`found`: share of exact search's top 10 that was recalled; hit rates at 5, of HTM and of exact search."""

    found: float
    hit_rate: float
    exact_hit_rate: float

    @property
    def is_good(self) -> bool:
        """Whether it meets the demo's bar."""
        return self.found >= MIN_FOUND and self.hit_rate >= self.exact_hit_rate - MAX_HITS_BELOW_EXACT


def measure(
    questions: Sequence[Question],
    queries: Floats,
    passages: Sequence[Passage],
    embeddings: Floats,
    recalled: Sequence[Sequence[int]],
) -> Quality:
    """Compare `recalled`, ten positions per question, best first, with exact search over `embeddings` [n, D]."""
    exact = np.argsort(-(queries @ embeddings.T), axis=1, kind="stable")[:, :10]
    found = [len(set(mine) & set(best)) / len(best) for mine, best in zip(recalled, exact.tolist(), strict=True)]
    return Quality(
        float(np.mean(found)),
        hit_rate(questions, passages, recalled),
        hit_rate(questions, passages, exact.tolist()),
    )


def hit_rate(questions: Sequence[Question], passages: Sequence[Passage], rows: Sequence[Sequence[int]]) -> float:
    """Share of the questions with a right module among the first five."""
    hits = [
        any(passages[place].package in question.modules for place in row[:5])
        for question, row in zip(questions, rows, strict=True)
    ]
    return float(np.mean(hits))
