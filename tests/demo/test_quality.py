"""The measure itself on vectors made by hand, and the demo's bar on the real corpus, without a server."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from examples.demo.agents import CHUNK_SIZE, TOP_K
from examples.demo.corpus import Passage
from examples.demo.embedder import Floats, TfidfEmbedder
from examples.demo.quality import Quality, measure
from examples.demo.questions import QUESTIONS, Question


def test_found_and_hits_by_hand() -> None:
    passages = [Passage("right.sub" if place == 12 else "wrong", "", 1, str(place)) for place in range(13)]
    embeddings = np.linspace(0, 1, 13, dtype=np.float32)[:, None]  # exact order: 12, 11, 10, ...
    query = np.ones((1, 1), np.float32)
    questions = [Question("?", ("right",))]
    exact = list(range(12, 2, -1))
    assert measure(questions, query, passages, embeddings, [exact]) == Quality(1.0, 1.0, 1.0)
    worse = [11, 10, 9, 8, 7, 12, 6, 0, 1, 2]  # the right one in sixth place, and 7 of the 10
    assert measure(questions, query, passages, embeddings, [worse]) == Quality(0.7, 0.0, 1.0)


def test_the_bar() -> None:
    assert Quality(0.9, 0.85, 0.9).is_good
    assert not Quality(0.89, 0.9, 0.9).is_good
    assert not Quality(0.95, 0.8, 0.9).is_good


def recall(query: Floats, embeddings: Floats) -> list[int]:
    """The model `retrieval` by its definition: front-anchored chunks, mean keys, tokens of the best by score."""
    num_chunks = -(-len(embeddings) // CHUNK_SIZE)
    keys = np.stack([embeddings[i * CHUNK_SIZE : (i + 1) * CHUNK_SIZE].mean(0) for i in range(num_chunks)])
    best = np.argsort(-(keys @ query), kind="stable")[:TOP_K]
    positions = np.flatnonzero(np.isin(np.arange(len(embeddings)) // CHUNK_SIZE, best))
    ranked = positions[np.argsort(-(embeddings[positions] @ query), kind="stable")]
    return [int(place) for place in ranked[:10]]


def test_recall_on_the_real_corpus_meets_the_bar(
    passages: Sequence[Passage], embedder: TfidfEmbedder, embeddings: Floats
) -> None:
    queries = embedder.embed([question.text for question in QUESTIONS])
    rows = [recall(query, embeddings) for query in queries]
    quality = measure(QUESTIONS, queries, passages, embeddings, rows)
    assert quality.is_good, quality
    assert quality.exact_hit_rate > 0.8, "the questions do not fit the corpus"
