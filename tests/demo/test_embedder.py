"""The embedders: unit rows, the same on every run, and clear words when a package is not there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.testing as npt
import pytest

from examples.demo.corpus import Passage
from examples.demo.embedder import DIM, Floats, SentenceEmbedder, TfidfEmbedder


def test_unit_rows_of_the_whole_corpus(embeddings: Floats, passages: Sequence[Passage]) -> None:
    assert embeddings.shape == (len(passages), DIM)
    assert embeddings.dtype == np.float32
    npt.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)


def test_the_same_on_every_run(passages: Sequence[Passage]) -> None:
    texts = [passage.embedded_text for passage in passages[:500]]
    npt.assert_array_equal(TfidfEmbedder(texts).embed(texts[:7]), TfidfEmbedder(texts).embed(texts[:7]))


def test_a_text_without_a_known_word_is_still_a_unit_vector(embedder: TfidfEmbedder) -> None:
    npt.assert_array_equal(embedder.embed(["xqzzy vwpfk"]), np.eye(1, DIM, dtype=np.float32))


def test_a_named_model_is_used_and_normed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        def __init__(self, name: str) -> None:
            assert name == "some-model"

        def encode(self, texts: list[str], show_progress_bar: bool) -> Any:
            return np.array([[3.0, 4.0], [0.0, 0.0]])[: len(texts)]

    package = ModuleType("sentence_transformers")
    package.SentenceTransformer = Model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    rows = SentenceEmbedder("some-model").embed(["a", "b"])
    npt.assert_allclose(rows, np.array([[0.6, 0.8], [1.0, 0.0]]), rtol=1e-6)
    assert rows.dtype == np.float32


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(OSError, match="--embedder m needs the package sentence-transformers"):
        SentenceEmbedder("m")
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    with pytest.raises(OSError, match=r"pip install '\.\[demo\]'"):
        TfidfEmbedder(["a text"])
