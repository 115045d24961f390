"""Embeddings made on the spot: TF-IDF and truncated SVD, or a sentence-transformers model when one is named.

All embeddings are unit vectors. Does not know passages beyond their text, nor sessions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
DIM = 256


class Embedder(Protocol):
    """Texts to unit vectors [n, D] float32."""

    name: str

    def embed(self, texts: Sequence[str]) -> Floats:
        """One row per text."""
        ...


class TfidfEmbedder:
    """TF-IDF over words, reduced by truncated SVD; fitted to `texts`, the same on every run.

    Raises OSError when scikit-learn is not installed.
    """

    def __init__(self, texts: Sequence[str], dim: int = DIM) -> None:
        try:
            from sklearn.decomposition import TruncatedSVD
            from sklearn.feature_extraction.text import TfidfVectorizer
            from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # scikit-learn needs it
        except ModuleNotFoundError as error:
            raise OSError(f"the demo needs {error.name}; install it with: pip install '.[demo]'") from error

        # float32, because the rows end as float32 and the decomposition takes a quarter of the time.
        self._tfidf: Any = TfidfVectorizer(
            sublinear_tf=True, stop_words="english", min_df=2, max_features=60_000, dtype=np.float32
        )
        matrix = self._tfidf.fit_transform(texts)
        dim = min(dim, matrix.shape[1] - 1)
        self._svd: Any = TruncatedSVD(dim, random_state=0, n_iter=3)
        with threadpool_limits(1):  # the matrices are thin: threads that wait for each other take 2 to 4 times as long
            self._svd.fit(matrix)
        self.name = f"TF-IDF ({matrix.shape[1]} terms), SVD to {dim}"

    def embed(self, texts: Sequence[str]) -> Floats:
        """See `Embedder`. A text without any known word is the first axis."""
        return _unit(self._svd.transform(self._tfidf.transform(texts)))


class SentenceEmbedder:
    """A sentence-transformers model by its name or path. Raises OSError when the package is not installed."""

    def __init__(self, model: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ModuleNotFoundError as error:
            raise OSError(f"--embedder {model} needs the package sentence-transformers, which is not there") from error
        self._model: Any = SentenceTransformer(model)
        self.name = f"sentence-transformers {model}"

    def embed(self, texts: Sequence[str]) -> Floats:
        """See `Embedder`."""
        return _unit(np.asarray(self._model.encode(list(texts), show_progress_bar=False)))


def _unit(rows: npt.NDArray[Any]) -> Floats:
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows[norms[:, 0] < 1e-6, 0] = 1.0
    unit: Floats = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
    return unit
