"""The settings of a model, the tensors they call for, and the hash that is a model's identity.

Shapes: D width (`dim`), H heads, E width per head (`dim_head`).
Does not know: files, devices, how a model is computed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from htm_service.config import MAX_TOP_K
from htm_service.errors import InvalidArgument, clipped, quoted

MAX_DIM = 16_384
MAX_HEADS = 1_024
MAX_CHUNK_SIZE = 4_096
MAX_SCALE = 1e6

T = TypeVar("T")

_TENSOR_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One HTM attention without its weights.

    `dim` and `dim_head` are None only for a model without weights, which takes any width. A scale of None
    stands for the default, D^-1/2 for summaries and E^-1/2 in chunks, and is replaced by its value.
    Raises InvalidArgument with the field, its value and the limit.
    """

    dim: int | None
    heads: int = 8
    dim_head: int | None = 64
    top_k: int = 2
    chunk_size: int = 32
    """The chunk size the weights were trained with: a session's default, not a demand."""
    position_encoding: bool = True
    block: bool = False
    """Whether the query is layer-normed first and added to the output (`HTMBlock`)."""
    summary_scale: float | None = None
    attention_scale: float | None = None

    def __post_init__(self) -> None:
        _check_int("heads", self.heads, MAX_HEADS)
        _check_int("top_k", self.top_k, MAX_TOP_K)
        _check_int("chunk_size", self.chunk_size, MAX_CHUNK_SIZE)
        for name, width in (("dim", self.dim), ("dim_head", self.dim_head)):
            if width is not None:
                _check_int(name, width, MAX_DIM)
        for name, flag in (("position_encoding", self.position_encoding), ("block", self.block)):
            if not isinstance(flag, bool):
                raise InvalidArgument(f"{name} is {clipped(repr(flag))}; it must be true or false")
        _check_scale("summary_scale", self.summary_scale, self.dim)
        _check_scale("attention_scale", self.attention_scale, self.dim_head)
        if self.dim is None and (self.position_encoding or self.block):
            raise InvalidArgument("dim is null; a model with position_encoding or block must have one")
        for name, scale, width in (
            ("summary_scale", self.summary_scale, self.dim),
            ("attention_scale", self.attention_scale, self.dim_head),
        ):
            resolved = _known(width) ** -0.5 if scale is None else scale
            object.__setattr__(self, name, float(resolved))

    @property
    def resolved_summary_scale(self) -> float:
        """The factor of the summary logits, as a number."""
        return _known(self.summary_scale)

    @property
    def resolved_attention_scale(self) -> float:
        """The factor of the in-chunk logits, as a number."""
        return _known(self.attention_scale)

    def to_json(self) -> str:
        """Canonical text: all fields, sorted keys, no spaces."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Parse what `to_json` wrote; all fields but `dim` and `dim_head` may be absent.

        Raises InvalidArgument when it is not an object, or a field is unknown, missing or out of range.
        """
        try:
            fields: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidArgument(f"config is not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise InvalidArgument(f"config is a JSON {type(fields).__name__}; it must be an object")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise InvalidArgument(f"config field {quoted(unknown[0])} is unknown; there are {', '.join(known)}")
        for name in ("dim", "dim_head"):
            if fields.get(name) is None:
                raise InvalidArgument(f"config field {name!r} is missing")
        return cls(**fields)


def check_tensors(config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Check that `tensors` are those that `config` calls for: names, shapes, dtypes, finite as float32.

    Raises InvalidArgument with the tensor, the value and what was expected.
    """
    required, optional = _tensor_shapes(config)
    missing = sorted(set(required) - set(tensors))
    if missing:
        raise InvalidArgument(f"tensor {missing[0]!r} is missing")
    shapes = required | optional
    for name, tensor in sorted(tensors.items()):
        if name not in shapes:
            raise InvalidArgument(f"tensor {quoted(name)} is unknown; there are {', '.join(sorted(shapes))}")
        if tuple(tensor.shape) != shapes[name]:
            raise InvalidArgument(
                f"tensor {name!r} has shape {list(tensor.shape)}; dim {config.dim}, heads {config.heads} and "
                f"dim_head {config.dim_head} call for {list(shapes[name])}"
            )
        if tensor.dtype not in _TENSOR_DTYPES:
            names = ", ".join(_dtype_name(dtype) for dtype in _TENSOR_DTYPES)
            raise InvalidArgument(f"tensor {name!r} has dtype {_dtype_name(tensor.dtype)}; it must be one of {names}")
        if not is_finite(single := tensor.float()):
            num_bad = int((~torch.isfinite(single)).sum())
            raise InvalidArgument(f"tensor {name!r} has {num_bad} values that are not finite in float32")


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are, of at least one: by the least and the greatest, for which nothing is written."""
    return all(math.isfinite(bound) for bound in torch.aminmax(tensor))


def content_hash(config: ModelConfig, tensors: Mapping[str, Tensor]) -> str:
    """Sha256 (hex) of the config and of each tensor's name, dtype, shape and little-endian bytes, by name.

    Neither the order of tensors nor other metadata of a file changes it.
    """
    digest = hashlib.sha256(config.to_json().encode())
    for name, tensor in sorted(tensors.items()):
        head = json.dumps([name, _dtype_name(tensor.dtype), list(tensor.shape)], separators=(",", ":"))
        digest.update(b"\n" + head.encode() + b"\n")
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tensor_shapes(config: ModelConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """The tensors a model must have, and those it may have; names as in htm-pytorch's state dict."""
    dim, inner = _known(config.dim), config.heads * _known(config.dim_head)
    required: dict[str, tuple[int, ...]] = {
        "to_summary_queries.weight": (dim, dim),
        "to_summary_keys.weight": (dim, dim),
        "attn.to_q.weight": (inner, dim),
        "attn.to_kv.weight": (2 * inner, dim),
        "attn.to_out.weight": (dim, inner),
        "attn.to_out.bias": (dim,),
    }
    if config.block:
        required |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    optional: dict[str, tuple[int, ...]] = {
        "to_summary_queries.bias": (dim,),
        "to_summary_keys.bias": (dim,),
        "attn.to_q.bias": (inner,),
        "attn.to_kv.bias": (2 * inner,),
    }
    return required, optional


def _check_int(name: str, value: object, limit: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
        raise InvalidArgument(f"{name} is {clipped(repr(value))}; it must be a whole number from 1 to {limit}")


def _check_scale(name: str, value: object, width: int | None) -> None:
    if value is None:
        if width is None:
            raise InvalidArgument(f"{name} is null; a model without a width must have one")
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_SCALE:
        raise InvalidArgument(f"{name} is {clipped(repr(value))}; it must be a number above 0, at most {MAX_SCALE:.0f}")


def _known(value: T | None) -> T:
    if value is None:
        raise InvalidArgument("a model with weights must have dim and dim_head")
    return value


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
