"""HTM attention by its definition, in float64 loops over queries, chunks and heads: the tests' oracle.

Written from docs/attention.md alone; shares no arithmetic with the code under test, and folds nothing.
Shapes: D width, C chunk size, n tokens, M chunks, Q queries, H heads, E width per head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from htm_service.attention.model_config import ModelConfig

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Reference:
    """`output` [Q, D]; `chunk_index`, `chunk_weight` [Q, top_k], in rank order, -1 and 0 where fewer are
    visible; `token_weight` [Q, n], 0 for tokens not recalled; `token_score` [Q, n], NaN for those, and
    without the part of the key bias, which is the same for all tokens of a query.
    """

    output: Array
    chunk_index: npt.NDArray[np.int64]
    chunk_weight: Array
    token_weight: Array
    token_score: Array


def htm_reference(
    queries: npt.ArrayLike,
    tokens: npt.ArrayLike,
    config: ModelConfig,
    weights: Mapping[str, Any] | None = None,
    *,
    top_k: int | None = None,
    chunk_size: int | None = None,
    visible: npt.ArrayLike | None = None,
    chunk_mask: npt.ArrayLike | None = None,
) -> Reference:
    """Attend `queries` [Q, D] to `tokens` [n, D].

    `weights` by the names of a model file (arrays or tensors), None for identity projections. `visible` [n]
    bool; `chunk_mask` [M] or [Q, M] bool. `top_k` and `chunk_size` default to the config's.
    """
    q_all = _array(queries)
    x = _array(tokens)
    num_queries, dim = q_all.shape
    n = len(x)
    size = chunk_size or config.chunk_size
    k = top_k or config.top_k
    num_chunks = -(-n // size)
    shown = np.ones(n, bool) if visible is None else np.asarray(visible, bool)
    allowed = np.ones(num_chunks, bool) if chunk_mask is None else np.asarray(chunk_mask, bool)
    allowed = np.broadcast_to(allowed, (num_queries, num_chunks))
    w = _Weights(config, weights, dim)

    output = np.zeros((num_queries, dim))
    chunk_index = np.full((num_queries, k), -1, np.int64)
    chunk_weight = np.zeros((num_queries, k))
    token_weight = np.zeros((num_queries, n))
    token_score = np.full((num_queries, n), np.nan)

    members = [[j for j in range(i * size, min(i * size + size, n)) if shown[j]] for i in range(num_chunks)]
    for r in range(num_queries):
        q = q_all[r]
        if config.block:
            q = (q - q.mean()) / np.sqrt(q.var() + 1e-5) * w.norm_weight + w.norm_bias
        logits = {}
        for i in range(num_chunks):
            if members[i] and allowed[r, i]:
                summary = sum(x[j] for j in members[i]) / len(members[i])
                logits[i] = (w.sq @ q + w.sq_bias) @ (w.sk @ summary + w.sk_bias) * config.summary_scale
        chosen = sorted(logits, key=lambda i: (-logits[i], i))[:k]
        for rank, (i, share) in enumerate(zip(chosen, _softmax([logits[i] for i in chosen]), strict=True)):
            chunk_index[r, rank] = i
            chunk_weight[r, rank] = share
            y = {j: x[j] + (_sinusoid(size - 1 - j % size, dim) if w.positions else 0.0) for j in members[i]}
            per_head = []
            for h in range(config.heads):
                scores = [(w.q[h] @ q + w.q_bias[h]) @ (w.k[h] @ y[j]) * w.attention_scale for j in members[i]]
                constant = (w.q[h] @ q + w.q_bias[h]) @ w.k_bias[h] * w.attention_scale
                attention = _softmax([score + constant for score in scores])
                per_head.append(
                    sum(a * (w.v[h] @ y[j] + w.v_bias[h]) for a, j in zip(attention, members[i], strict=True))
                )
                for a, score, j in zip(attention, scores, members[i], strict=True):
                    token_weight[r, j] += share * a / config.heads
                    token_score[r, j] = np.nan_to_num(token_score[r, j]) + score / config.heads
            output[r] += share * (w.out @ np.concatenate(per_head) + w.out_bias)
        if config.block:
            output[r] += q
    return Reference(output, chunk_index, chunk_weight, token_weight, token_score)


def relative_error(actual: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """||actual - expected|| / ||expected||; the norm itself where nothing is expected."""
    a, e = _array(actual), _array(expected)
    assert a.shape == e.shape, f"{a.shape} is not {e.shape}"
    difference = np.abs(a - e)
    error = float(np.linalg.norm(a - e) / (np.linalg.norm(e) or 1.0))
    if difference.size:
        print(f"max difference {difference.max():.3e}, mean {difference.mean():.3e}, relative {error:.3e}")
    return error


class _Weights:
    """Projections per head, as float64, identity where there are none."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Any] | None, dim: int) -> None:
        self.positions = config.position_encoding
        self.attention_scale = config.attention_scale
        heads, width = config.heads, config.dim_head or dim
        if weights is None:
            eye = np.eye(dim)
            weights = {
                "to_summary_queries.weight": eye,
                "to_summary_keys.weight": eye,
                "attn.to_q.weight": eye,
                "attn.to_kv.weight": np.concatenate((eye, eye)),
                "attn.to_out.weight": eye,
                "attn.to_out.bias": np.zeros(dim),
            }
        get = {name: _array(value) for name, value in weights.items()}

        def bias(name: str, size: int) -> Array:
            return get.get(name, np.zeros(size))

        inner = heads * width
        self.sq, self.sk = get["to_summary_queries.weight"], get["to_summary_keys.weight"]
        self.sq_bias, self.sk_bias = bias("to_summary_queries.bias", dim), bias("to_summary_keys.bias", dim)
        self.q = get["attn.to_q.weight"].reshape(heads, width, dim)
        self.q_bias = bias("attn.to_q.bias", inner).reshape(heads, width)
        self.k, self.v = get["attn.to_kv.weight"].reshape(2, heads, width, dim)
        self.k_bias, self.v_bias = bias("attn.to_kv.bias", 2 * inner).reshape(2, heads, width)
        self.out, self.out_bias = get["attn.to_out.weight"], get["attn.to_out.bias"]
        self.norm_weight, self.norm_bias = bias("norm.weight", dim), bias("norm.bias", dim)


def _array(value: Any) -> Array:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, np.float64)


def _softmax(logits: list[float]) -> Array:
    if not logits:
        return np.zeros(0)
    exponents = np.exp(np.asarray(logits) - max(logits))
    return np.asarray(exponents / exponents.sum(), np.float64)


def _sinusoid(position: int, dim: int) -> Array:
    angles = [position * 10_000.0 ** (-2 * t / dim) for t in range((dim + 1) // 2)]
    return np.asarray([*np.sin(angles), *np.cos(angles)][:dim])
