"""Other people's weights as a model file: htm-pytorch state dicts, DeepMind's Haiku parameters, our modules.

Used by the command line and in training scripts, never by the server: this is the only module that opens a
`.pt` file, and it does so with `weights_only=True`.
Does not know: how a model is computed or served (`model.py`).

Haiku names, as DeepMind's `HierarchicalMemoryAttention` makes them, P being any path (it may be empty):

    P/query/w                  [D, D]    summary query             no bias
    P/key/w                    [D, D]    summary key               no bias
    P/within_mem_attn/query    w [D, D]  b [D]
    P/within_mem_attn/key      w [D, D]  b [D]
    P/within_mem_attn/value    w [D, D]  b [D]
    P/within_mem_attn/linear   w [D, D]  b [D]    output
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from htm_service.attention.model import ProjectedModel
from htm_service.attention.model_config import ModelConfig, check_tensors
from htm_service.attention.model_file import model_bytes
from htm_service.attention.modules import HTMAttention, HTMBlock
from htm_service.errors import InvalidArgument
from htm_service.records import ModelInfo

Source = Literal["htm-pytorch", "htm-pytorch-block", "haiku"]
Converted = tuple[ModelConfig, dict[str, Tensor]]

_POSITIONS = "pos_emb.inv_freqs"
_IN_CHUNK = "within_mem_attn"
_HAIKU_NAMES = tuple(
    [f"{name}/w" for name in ("query", "key")]
    + [f"{_IN_CHUNK}/{name}/{kind}" for name in ("query", "key", "value", "linear") for kind in ("w", "b")]
)


def from_htm_pytorch(
    state_dict: Mapping[str, Any],
    *,
    heads: int,
    dim_head: int | None = None,
    top_k: int = 2,
    chunk_size: int = 32,
    position_encoding: bool | None = None,
    block: bool = False,
    summary_scale: float | None = None,
) -> Converted:
    """The config and tensors of a state dict of htm-pytorch's `HTMAttention`, or `HTMBlock` with `block`.

    A state dict does not tell `heads`, `top_k` and `chunk_size`: give what it was trained with. `dim_head`
    and `position_encoding` follow from it, and must agree when given. Raises InvalidArgument otherwise.
    """
    tensors = dict(state_dict)
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise InvalidArgument(f"{name!r} is a {type(value).__name__}; a state dict holds tensors")
    looks_like_block = "norm.weight" in tensors
    if looks_like_block != block:
        what = "has norm.weight" if looks_like_block else "lacks norm.weight"
        raise InvalidArgument(f"the state dict {what}, which only an HTMBlock has, but block is {block}")
    if block:
        # In HTMBlock the attention is the submodule `attn`, so that to_q is attn.attn.to_q.
        tensors = {name.removeprefix("attn."): tensor for name, tensor in tensors.items()}

    has_positions = tensors.pop(_POSITIONS, None) is not None
    if position_encoding is not None and position_encoding != has_positions:
        what = "has" if has_positions else "has no"
        raise InvalidArgument(f"the state dict {what} {_POSITIONS}, but position_encoding is {position_encoding}")
    dim, inner = _matrix(tensors, "to_summary_queries.weight")[0], _matrix(tensors, "attn.to_q.weight")[0]
    config = ModelConfig(
        dim=dim,
        heads=heads,
        dim_head=_dim_head(inner, heads, dim_head),
        top_k=top_k,
        chunk_size=chunk_size,
        position_encoding=has_positions,
        block=block,
        summary_scale=summary_scale,
    )
    return _checked(config, tensors)


def from_module(module: HTMAttention | HTMBlock) -> Converted:
    """The config and tensors of one of our modules, ready for `save_model`.

    Served means are exact, as with `eps` 0. Raises InvalidArgument for a weight that is not finite.
    """
    attention = module.attn if isinstance(module, HTMBlock) else module
    return from_htm_pytorch(
        module.state_dict(),
        heads=attention.attn.heads,
        top_k=attention.topk_mems,
        chunk_size=attention.mem_chunk_size,
        block=isinstance(module, HTMBlock),
        summary_scale=attention.scale,
    )


def from_haiku(
    params: Mapping[str, Any],
    *,
    heads: int,
    top_k: int,
    chunk_size: int = 32,
    position_encoding: bool = True,
) -> Converted:
    """The config and tensors of DeepMind's module; names at the head of this file, each `module/path/w`.

    `params` may be flat or Haiku's own two levels (module, then `w` and `b`), and may hold other modules,
    which are left out. Weights are [in, out] there and are transposed. Raises InvalidArgument when there is
    not exactly one such module, or an array is missing, unknown or of the wrong shape.
    """
    arrays = _haiku_arrays(params)
    weights = {name: _to_tensor(name, array) for name, array in arrays.items()}
    dim = _matrix(weights, "query/w")[1]
    inner = _matrix(weights, f"{_IN_CHUNK}/query/w")[1]
    config = ModelConfig(
        dim=dim,
        heads=heads,
        dim_head=_dim_head(inner, heads, None),
        top_k=top_k,
        chunk_size=chunk_size,
        position_encoding=position_encoding,
    )

    def in_chunk(name: str, kind: str) -> Tensor:
        return weights[f"{_IN_CHUNK}/{name}/{kind}"]

    return _checked(
        config,
        {
            "to_summary_queries.weight": weights["query/w"],
            "to_summary_keys.weight": weights["key/w"],
            "attn.to_q.weight": in_chunk("query", "w"),
            "attn.to_q.bias": in_chunk("query", "b"),
            "attn.to_kv.weight": torch.cat((in_chunk("key", "w"), in_chunk("value", "w"))),
            "attn.to_kv.bias": torch.cat((in_chunk("key", "b"), in_chunk("value", "b"))),
            "attn.to_out.weight": in_chunk("linear", "w"),
            "attn.to_out.bias": in_chunk("linear", "b"),
        },
    )


def convert_file(
    src: Path,
    dst: Path,
    source: Source = "htm-pytorch",
    *,
    heads: int,
    dim_head: int | None = None,
    top_k: int = 2,
    chunk_size: int = 32,
    position_encoding: bool | None = None,
) -> ModelInfo:
    """Read `src` (`.pt`, `.pth`, `.safetensors` or `.npz`) and write the model file `dst` (`.safetensors`).

    Returns what the server will say about it. Raises InvalidArgument, which names `src`, when it cannot be
    read or does not hold such weights; and OSError when `dst` cannot be written.
    """
    if dst.suffix != ".safetensors":
        raise InvalidArgument(f"{dst}: a model file's name must end in .safetensors")
    try:
        if source == "haiku":
            positions = True if position_encoding is None else position_encoding
            config, tensors = from_haiku(
                _read(src), heads=heads, top_k=top_k, chunk_size=chunk_size, position_encoding=positions
            )
            if dim_head is not None:
                _dim_head(config.heads * (config.dim_head or 0), heads, dim_head)
        elif source in ("htm-pytorch", "htm-pytorch-block"):
            config, tensors = from_htm_pytorch(
                _read(src),
                heads=heads,
                dim_head=dim_head,
                top_k=top_k,
                chunk_size=chunk_size,
                position_encoding=position_encoding,
                block=source == "htm-pytorch-block",
            )
        else:
            raise InvalidArgument(f"source is {source!r}; it must be htm-pytorch, htm-pytorch-block or haiku")
    except InvalidArgument as error:
        raise InvalidArgument(f"{src}: {error.detail}") from error
    dst.write_bytes(model_bytes(config, tensors))
    return ProjectedModel(config, tensors).info(dst.stem)


def _read(path: Path) -> Mapping[str, Any]:
    """The named tensors or arrays of a file; pickled objects are refused in each format."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if path.suffix in (".pt", ".pth"):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise InvalidArgument(f"suffix {path.suffix!r}; it must be .pt, .pth, .safetensors or .npz")
    except InvalidArgument:
        raise
    except OSError as error:
        raise InvalidArgument(f"cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged file trips these parsers in many ways, and each is the file's fault
        raise InvalidArgument(f"is not a {path.suffix} file of tensors: {error}") from error
    if not isinstance(loaded, Mapping):
        raise InvalidArgument(f"holds a {type(loaded).__name__}; it must hold a state dict")
    return loaded


def _haiku_arrays(params: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of the one attention module in `params`, by their names relative to it."""
    flat: dict[str, Any] = {}
    for path, value in params.items():
        if isinstance(value, Mapping):
            flat |= {f"{path}/{name}": array for name, array in value.items()}
        else:
            flat[path] = value
    mark = f"{_IN_CHUNK}/query/w"
    prefixes = sorted(path.removesuffix(mark) for path in flat if f"/{path}".endswith(f"/{mark}"))
    if len(prefixes) != 1:
        raise InvalidArgument(f"there are {len(prefixes)} arrays named */{mark}, there must be one; found {prefixes}")
    prefix = prefixes[0]
    own = {path.removeprefix(prefix): array for path, array in flat.items() if path.startswith(prefix)}
    if not prefix:  # then every other module of the agent has it too
        own = {path: array for path, array in own.items() if path in _HAIKU_NAMES}
    missing = [name for name in _HAIKU_NAMES if name not in own]
    unknown = sorted(set(own) - set(_HAIKU_NAMES))
    if missing or unknown:
        what = f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r}, which is unknown"
        raise InvalidArgument(f"module {prefix!r} {what}; it must hold {', '.join(_HAIKU_NAMES)}")
    return own


def _to_tensor(name: str, value: Any) -> Tensor:
    """A Haiku array as a tensor, matrices transposed to [out, in]."""
    array = np.asarray(value)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise InvalidArgument(f"{name!r} has dtype {array.dtype}; it must be float16, float32 or float64")
    native = np.array(array.T, dtype=array.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(native)


def _matrix(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """The shape of a matrix. Raises InvalidArgument when it is missing or no matrix."""
    if name not in tensors:
        raise InvalidArgument(f"tensor {name!r} is missing; there are {', '.join(sorted(tensors)) or 'none'}")
    shape = tuple(tensors[name].shape)
    if len(shape) != 2:
        raise InvalidArgument(f"tensor {name!r} has shape {list(shape)}; it must be a matrix")
    return shape


def _dim_head(inner: int, heads: int, dim_head: int | None) -> int:
    if heads < 1 or inner % heads:
        raise InvalidArgument(f"heads is {heads}; it must divide the inner width {inner}")
    if dim_head is not None and dim_head != inner // heads:
        raise InvalidArgument(
            f"dim_head is {dim_head}; {heads} heads in an inner width of {inner} have {inner // heads}"
        )
    return inner // heads


def _checked(config: ModelConfig, tensors: Mapping[str, Tensor]) -> Converted:
    check_tensors(config, tensors)
    return config, {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
