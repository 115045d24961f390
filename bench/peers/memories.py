"""What every system is filled with and asked: real text in its natural order, and what exact search finds in it.

Passages of Python's standard library (the demo's corpus) are cut into pieces of about 16 words, each with the name of
where it is from; embeddings are TF-IDF and SVD, unit vectors. One passage in twenty is kept out of the memories, and
its first piece is a query. Does not know who is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from examples.demo.corpus import Passage, read_corpus
from examples.demo.embedder import TfidfEmbedder

Floats = npt.NDArray[np.float32]
NUM_WORDS = 16
NOT_KEPT = 20
NUM_QUERIES = 200
NUM_RECALLED = 8


@dataclass(frozen=True, slots=True)
class Memories:
    """`vectors` [n, D] with their `texts`, and `queries` [Q, D]: unit vectors."""

    vectors: Floats
    texts: list[str]
    queries: Floats

    def recall_of(self, found: Sequence[Sequence[int]]) -> float:
        """The share of exact search's best that answers to the queries hold: per query, places in `vectors`.

        Whatever scores like the last of the best counts as one of them: equal texts are equally good.
        """
        hits = 0
        for query, places in zip(self.queries, found, strict=True):
            scores = self.vectors @ query
            least = np.partition(scores, -NUM_RECALLED)[-NUM_RECALLED] - 1e-5
            hits += int((scores[sorted(set(places))] >= least).sum())
        return hits / (NUM_RECALLED * len(self.queries))

    def shuffled(self) -> Memories:
        """The same in an order without meaning, the same on every run."""
        order = np.random.default_rng(0).permutation(len(self.texts))
        return Memories(self.vectors[order], [self.texts[place] for place in order], self.queries)


def make_memories(num: int, dim: int) -> Memories:
    """`num` memories of width `dim`, always the same with one version of Python. ValueError: too many."""
    texts, asked = cut(read_corpus(), num)
    embedder = TfidfEmbedder(texts, dim)
    return Memories(embedder.embed(texts), texts, embedder.embed(asked[:NUM_QUERIES]))


def cut(passages: Sequence[Passage], num: int) -> tuple[list[str], list[str]]:
    """The first `num` pieces, and the first pieces of the passages among them that are kept out."""
    texts: list[str] = []
    asked: list[str] = []
    for number, passage in enumerate(passages):
        pieces = _pieces(passage)
        if number % NOT_KEPT == NOT_KEPT - 1:
            asked.append(pieces[0])
        else:
            texts += pieces
        if len(texts) >= num:
            return texts[:num], asked
    raise ValueError(f"the standard library gives {len(texts)} pieces, {num} are needed")


def _pieces(passage: Passage) -> list[str]:
    words = passage.text.split()
    count = max(1, round(len(words) / NUM_WORDS))
    ends = [len(words) * number // count for number in range(count + 1)]
    return [f"{passage.context} {' '.join(words[start:end])}" for start, end in pairwise(ends)]
