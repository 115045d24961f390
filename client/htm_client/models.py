"""Weights as a model file: of an HTMAttention or HTMBlock, a state dict, or a file that is one already.

Modules are known by their attributes, those of htm-pytorch's and of htm-service's are the same; tensors by their
methods. Imports neither torch nor the server, which checks what is in the file. Does not know how it is sent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from htm_client import safetensors
from htm_client.errors import InvalidArgument
from htm_client.options import ModelOptions

FORMAT = "htm-service-model"
VERSION = "1"
_POSITIONS = "pos_emb.inv_freqs"
_SETTINGS = ("heads", "dim_head", "top_k", "chunk_size")

Array = npt.NDArray[Any]


def model_file(source: Any, options: ModelOptions) -> bytes:
    """The model file of a module, a state dict, or a path. Raises InvalidArgument, TypeError, OSError."""
    if isinstance(source, str | os.PathLike):
        return _of_path(Path(source), options)
    if isinstance(source, Mapping):
        return _of_state_dict(source, options)
    if callable(getattr(source, "state_dict", None)):
        return _of_module(source, options)
    raise TypeError(f"a model is an HTMAttention, an HTMBlock, a state dict or a path, not {source!r:.100}")


def _of_path(path: Path, options: ModelOptions) -> bytes:
    if path.suffix != ".safetensors":
        raise InvalidArgument(
            f"{path}: only .safetensors is read here; `htm-service models convert` reads others; or give a state dict"
        )
    data = path.read_bytes()
    try:
        if safetensors.metadata_of(data).get("format") != FORMAT:
            return _of_state_dict(safetensors.tensors_of(data), options)
    except ValueError as error:
        raise InvalidArgument(f"{path}: {error}") from error
    if given := sorted(set(_SETTINGS) & options.keys()):
        raise InvalidArgument(f"{path} is a model file, which says its {given[0]} itself")
    return data


def _of_module(module: Any, options: ModelOptions) -> bytes:
    attention = module if hasattr(module, "to_summary_queries") else getattr(module, "attn", None)
    try:
        heads, scale = attention.attn.heads, float(attention.scale)  # type: ignore[union-attr]
        known: ModelOptions = {"top_k": attention.topk_mems, "chunk_size": attention.mem_chunk_size}  # type: ignore[union-attr]
    except AttributeError as error:
        kind = type(module).__name__
        raise TypeError(f"a {kind} is neither an HTMAttention nor an HTMBlock: {error}") from None
    if options.get("heads", heads) != heads:
        raise InvalidArgument(f"heads is {options['heads']}, the module has {heads}")
    return _of_state_dict(module.state_dict(), {**known, **options, "heads": heads}, scale)


def _of_state_dict(state_dict: Mapping[str, Any], options: ModelOptions, summary_scale: float | None = None) -> bytes:
    """As of htm-pytorch; in that of an HTMBlock the attention is the submodule `attn`."""
    block = "norm.weight" in state_dict
    tensors = {(name.removeprefix("attn.") if block else name): value for name, value in state_dict.items()}
    position_encoding = tensors.pop(_POSITIONS, None) is not None
    arrays = {name: _array(name, value) for name, value in tensors.items()}
    if (heads := options.get("heads")) is None:
        raise InvalidArgument("a state dict does not tell heads: give the number that it was trained with")
    inner, dim = _matrix(arrays, "attn.to_q.weight")
    if heads < 1 or inner % heads or options.get("dim_head", inner // heads) != inner // heads:
        dim_head = options.get("dim_head", "left out")
        raise InvalidArgument(
            f"heads is {heads} and dim_head {dim_head}: their product must be the inner width {inner}"
        )
    config = {
        "dim": dim,
        "heads": heads,
        "dim_head": inner // heads,
        "top_k": options.get("top_k", 2),
        "chunk_size": options.get("chunk_size", 32),
        "position_encoding": position_encoding,
        "block": block,
        "summary_scale": summary_scale,
    }
    return safetensors.write(arrays, {"format": FORMAT, "version": VERSION, "config": json.dumps(config)})


def _array(name: str, value: Any) -> Array:
    """The numbers of a tensor or an array as they are; bfloat16, which numpy has not, as float32."""
    if hasattr(value, "detach"):
        tensor = value.detach()
        array: Array = (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy(force=True)
    else:
        array = np.asarray(value)
    if array.dtype.newbyteorder("<") not in safetensors.FLOATS:
        raise TypeError(f"{name!r} holds {array.dtype}; a state dict holds floating-point numbers")
    return array


def _matrix(arrays: Mapping[str, Array], name: str) -> tuple[int, int]:
    if name not in arrays or arrays[name].ndim != 2:
        found = ", ".join(sorted(arrays)) or "nothing"
        raise InvalidArgument(f"there is no matrix {name!r}, as HTMAttention and HTMBlock have; found {found:.300}")
    shape: tuple[int, int] = arrays[name].shape
    return shape
