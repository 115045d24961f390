"""The real corpus and its embeddings, read and made once for all tests here."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from examples.demo.corpus import Passage, read_corpus
from examples.demo.embedder import Floats, TfidfEmbedder


@pytest.fixture(scope="session")
def passages() -> Sequence[Passage]:
    return read_corpus()


@pytest.fixture(scope="session")
def embedder(passages: Sequence[Passage]) -> TfidfEmbedder:
    return TfidfEmbedder([passage.embedded_text for passage in passages])


@pytest.fixture(scope="session")
def embeddings(passages: Sequence[Passage], embedder: TfidfEmbedder) -> Floats:
    """[n, 256]."""
    return embedder.embed([passage.embedded_text for passage in passages])
