"""Models as the serving path uses them: every projection folded into the query, none into the store.

Shapes: R rows (queries of one batch), D width, H heads, E width per head, C chunk size.

The serving path asks `model.answer(queries, view, kernel)`, and `model.select` which chunks that would read. The model
knows its weights, the kernel does the arithmetic. Exact algebra, see docs/attention.md.

Owns: the algebra of a model. Does not know: files and names of models, sessions, chunks, training (`modules.py`).
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from htm_service.attention.model_config import ModelConfig, check_tensors, content_hash, is_finite
from htm_service.attention.positions import position_table
from htm_service.errors import InvalidArgument
from htm_service.kernels.base import Attended, Batch, Kernel, Projections, View
from htm_service.records import ModelInfo, ModelSource

LAYER_NORM_EPS = 1e-5
_MAX_POSITION_TABLES = 64


class Model(ABC):
    """One HTM attention. Immutable; inference only; float32 in and out, on `device`."""

    config: ModelConfig
    hash: str
    """Sha256 (hex) of the canonical content: the model's identity."""
    device: torch.device

    def __init__(self, config: ModelConfig, content: str, device: torch.device | str) -> None:
        self.config = config
        self.hash = content
        self.device = torch.device(device)
        self._tables: dict[int, Tensor] = {}
        self._tables_lock = threading.Lock()

    @property
    def dim(self) -> int | None:
        """Width D; None when the model takes any."""
        return self.config.dim

    @property
    def heads(self) -> int:
        """Number of heads H."""
        return self.config.heads

    @abstractmethod
    def fold(self, queries: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
        """Queries [R, D] as they meet summary keys [R, D] and tokens [R, H, D]: see `Batch`."""

    def scoring(self, queries: Tensor, kernel: Kernel) -> Tensor:
        """Queries [R, D] as u [R, D]: a token's score is <u, y>, its in-chunk logit, mean over heads."""
        return self.fold(queries, kernel)[1].mean(dim=1)

    @abstractmethod
    def answer(self, queries: Tensor, view: View, kernel: Kernel) -> tuple[Attended, Tensor]:
        """What `queries` [R, D] take of a view, and the outputs [R, D]; zero, in a block the normed query, for none."""

    def select(self, queries: Tensor, view: View, kernel: Kernel) -> Tensor:
        """The chunks that `answer` would take, without reading them: `Attended.chunk_index`."""
        return kernel.select(Batch(view, *self.fold(queries, kernel)))

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """The same model on `device`; itself when it is there already."""

    def positions(self, chunk_size: int) -> Tensor | None:
        """What is added to the tokens of a chunk, [C, D] on `device`, or None without position encoding."""
        if not self.config.position_encoding or self.config.dim is None:
            return None
        with self._tables_lock:
            table = self._tables.get(chunk_size)
            if table is None:
                if len(self._tables) >= _MAX_POSITION_TABLES:
                    self._tables.clear()  # sessions choose chunk sizes: tables must not pile up
                table = position_table(chunk_size, self.config.dim).to(self.device)
                self._tables[chunk_size] = table
        return table

    def take_positions(self, other: Model) -> None:
        """Take over what another model, which this one replaces, has made of positions: it depends on no weights."""
        if (self.dim, self.config.position_encoding) == (other.dim, other.config.position_encoding):
            with other._tables_lock:
                self._tables = {**other._tables, **self._tables}

    def info(self, name: str, source: ModelSource = "file") -> ModelInfo:
        """What the API tells about this model when it is served under `name`."""
        config = self.config
        return ModelInfo(
            name=name,
            source=source,
            hash=self.hash,
            dim=config.dim,
            heads=config.heads,
            dim_head=config.dim_head,
            top_k=config.top_k,
            chunk_size=config.chunk_size,
            position_encoding=config.position_encoding,
            block=config.block,
            summary_scale=config.resolved_summary_scale,
            attention_scale=config.resolved_attention_scale,
        )


class ProjectedModel(Model):
    """A model with weights; `tensors` by htm-pytorch's names, see docs/attention.md.

    Raises InvalidArgument when `tensors` are not those that `config` calls for.
    """

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        check_tensors(config, tensors)
        super().__init__(config, content_hash(config, tensors), device)
        self._tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        self._load()

    def _load(self) -> None:
        """Fold the weights, in float64 so that the product of two matrices costs no precision."""
        heads = self.config.heads
        full = {name: tensor.double() for name, tensor in self._tensors.items()}

        def bias(name: str, size: int) -> Tensor:
            return full.get(name, torch.zeros(size, dtype=torch.float64))

        out = full["attn.to_out.weight"]
        dim, inner = out.shape
        w_sk = full["to_summary_keys.weight"] * self.config.resolved_summary_scale
        scale = self.config.resolved_attention_scale
        w_k, w_v = full["attn.to_kv.weight"].chunk(2)  # [H E, D] each
        _, b_v = bias("attn.to_kv.bias", 2 * inner).chunk(2)
        folded = {
            "summary": w_sk.T @ full["to_summary_queries.weight"],
            "summary_bias": w_sk.T @ bias("to_summary_queries.bias", dim),
            "query": full["attn.to_q.weight"] * scale,
            "query_bias": bias("attn.to_q.bias", inner) * scale,
            "key": w_k.reshape(heads, -1, dim),
            "value": w_v.reshape(heads, -1, dim),
            "output": out,
            "output_bias": out @ b_v + full["attn.to_out.bias"],
        }
        single = {name: tensor.float() for name, tensor in folded.items()}
        for name, tensor in folded.items():
            if not is_finite(single[name]):
                largest = float(tensor.abs().max())
                raise InvalidArgument(f"what the weights fold to overflows float32: {name} has {largest:g}")
        self._projections = Projections(
            **{name: tensor.contiguous().to(self.device) for name, tensor in single.items()}
        )
        if self.config.block:
            # In float64, in which no query's squares overflow: in float32 one of 1e20 would be normed to zero.
            self._norm = (full["norm.weight"].to(self.device), full["norm.bias"].to(self.device))  # [D], [D]

    def fold(self, queries: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
        """Layer-normed first in a block; see `Model.fold`."""
        return kernel.fold(self._projections, self._normed(queries))

    def answer(self, queries: Tensor, view: View, kernel: Kernel) -> tuple[Attended, Tensor]:
        """In one call of the kernel; see `Model.answer`."""
        queries = self._normed(queries)
        attended, output = kernel.answer(self._projections, queries, view)
        return attended, output + queries if self.config.block else output

    def _normed(self, queries: Tensor) -> Tensor:
        """Queries [R, D], layer-normed in a block."""
        if not self.config.block:
            return queries
        return functional.layer_norm(queries.double(), queries.shape[-1:], *self._norm, eps=LAYER_NORM_EPS).float()

    def to(self, device: torch.device | str) -> Self:
        """The same model on `device`; itself when it is there already."""
        device = torch.device(device)
        return self if device == self.device else type(self)(self.config, self._tensors, device)


class RetrievalModel(Model):
    """The built-in model without weights, for any D: identity projections, one head, no positions.

    A scale of 20 is a softmax temperature of 0.05 for embeddings of unit norm. Raises InvalidArgument when
    an argument is out of range.
    """

    def __init__(
        self,
        summary_scale: float = 20.0,
        attention_scale: float = 20.0,
        top_k: int = 8,
        device: torch.device | str = "cpu",
    ) -> None:
        config = ModelConfig(
            dim=None,
            heads=1,
            dim_head=None,
            top_k=top_k,
            position_encoding=False,
            summary_scale=summary_scale,
            attention_scale=attention_scale,
        )
        super().__init__(config, content_hash(config, {}), device)
        self._summary_scale, self._attention_scale = summary_scale, attention_scale

    def fold(self, queries: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
        """Scaled; see `Model.fold`."""
        return queries * self._summary_scale, queries[:, None] * self._attention_scale

    def scoring(self, queries: Tensor, kernel: Kernel) -> Tensor:
        """As they are, so that scores are plain inner products; see `Model.scoring`."""
        return queries

    def answer(self, queries: Tensor, view: View, kernel: Kernel) -> tuple[Attended, Tensor]:
        """The sum of tokens is the answer; see `Model.answer`."""
        attended = kernel.attend(Batch(view, *self.fold(queries, kernel)))
        return attended, attended.z[:, 0]

    def to(self, device: torch.device | str) -> Self:
        """The same model on `device`; itself when it is there already."""
        device = torch.device(device)
        if device == self.device:
            return self
        config = self.config
        return type(self)(config.resolved_summary_scale, config.resolved_attention_scale, config.top_k, device=device)
