"""Other people's weights as a model file: htm-pytorch state dicts, DeepMind's Haiku parameters, our modules.

Used by the command line and in training scripts, never by the server: this is the only module that opens a
`.pt` file, and it does so with `weights_only=True`.
Does not know: how a model is computed or served (`model.py`).

Haiku names, as DeepMind's `HierarchicalMemoryAttention` makes them, P being any path (it may be empty), D the width of
queries and memories, F its `feature_size`, which is D in DeepMind's agents:

    P/query/w                  [D, F]    summary query             no bias
    P/key/w                    [D, F]    summary key               no bias
    P/within_mem_attn/query    w [D, F]  b [F]
    P/within_mem_attn/key      w [D, F]  b [F]
    P/within_mem_attn/value    w [D, F]  b [F]
    P/within_mem_attn/linear   w [F, O]  b [O]    output
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional

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
    layer: str | None = None,
) -> Converted:
    """The config and tensors of DeepMind's module; names at the head of this file, each `module/path/w`.

    `params` may be flat or Haiku's own two levels (module, then `w` and `b`), and may hold other modules,
    which are left out; of several layers `layer` says which, by its path P or the end of it. Weights are [in, out]
    there and are transposed. Another `feature_size` F than the width D is served where the output has the width D
    again: the summary's scale F^-1/2 is kept. Raises InvalidArgument when there is not exactly one such module, or an
    array is missing, unknown or of the wrong shape.
    """
    arrays = _haiku_arrays(params, layer)
    weights = {name: _to_tensor(name, array) for name, array in arrays.items()}
    feature_size, dim = _matrix(weights, "query/w")
    inner, _ = _matrix(weights, f"{_IN_CHUNK}/query/w")  # [out, in] by now
    dim_head = _dim_head(inner, heads, None)
    if (width := _matrix(weights, f"{_IN_CHUNK}/linear/w")[0]) != dim:
        raise InvalidArgument(
            f"its output has width {width}, its memories have {dim}: a feature_size of {feature_size} (dim_head "
            f"{dim_head}) is served only where the output has the width of the memories"
        )
    config = ModelConfig(
        dim=dim,
        heads=heads,
        dim_head=dim_head,
        top_k=top_k,
        chunk_size=chunk_size,
        position_encoding=position_encoding,
        summary_scale=feature_size**-0.5,
    )
    summary_queries, summary_keys = _square(weights["query/w"], weights["key/w"])

    def in_chunk(name: str, kind: str) -> Tensor:
        return weights[f"{_IN_CHUNK}/{name}/{kind}"]

    return _checked(
        config,
        {
            "to_summary_queries.weight": summary_queries,
            "to_summary_keys.weight": summary_keys,
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
    layer: str | None = None,
) -> dict[Path, ModelInfo]:
    """Read `src` (`.pt`, `.pth`, `.safetensors` or `.npz`) and write the model file `dst` (`.safetensors`).

    Several layers of Haiku parameters become NAME-0, NAME-1, ... beside each other, in the order of their numbers,
    unless `layer` names one. Returns what the server will say about each file. Raises InvalidArgument, which names
    `src`, when it cannot be read or does not hold such weights; and OSError when `dst` cannot be written.
    """
    if dst.suffix != ".safetensors":
        raise InvalidArgument(f"{dst}: a model file's name must end in .safetensors")
    try:
        if layer is not None and source != "haiku":
            raise InvalidArgument(f"layer is {layer!r}; only haiku parameters have several")
        if source == "haiku":
            positions = True if position_encoding is None else position_encoding
            params = _read(src)
            layers: Sequence[str | None] = [layer] if layer is not None else haiku_layers(params) or [None]
            found = [
                from_haiku(
                    params,
                    heads=heads,
                    top_k=top_k,
                    chunk_size=chunk_size,
                    position_encoding=positions,
                    layer=one,
                )
                for one in layers
            ]
            for config, _ in found:
                if dim_head is not None:
                    _dim_head(config.heads * (config.dim_head or 0), heads, dim_head)
        elif source in ("htm-pytorch", "htm-pytorch-block"):
            converted = from_htm_pytorch(
                _read(src),
                heads=heads,
                dim_head=dim_head,
                top_k=top_k,
                chunk_size=chunk_size,
                position_encoding=position_encoding,
                block=source == "htm-pytorch-block",
            )
            found = [converted]
        else:
            raise InvalidArgument(f"source is {source!r}; it must be htm-pytorch, htm-pytorch-block or haiku")
    except InvalidArgument as error:
        raise InvalidArgument(f"{src}: {error.detail}") from error
    infos: dict[Path, ModelInfo] = {}
    for number, (config, tensors) in enumerate(found):
        path = dst if len(found) == 1 else dst.with_stem(f"{dst.stem}-{number}")
        path.write_bytes(model_bytes(config, tensors))
        infos[path] = ProjectedModel(config, tensors).info(path.stem)
    return infos


def haiku_layers(params: Mapping[str, Any]) -> list[str]:
    """The paths of DeepMind's modules in Haiku parameters; Haiku numbers those of one name: `x`, `x_1`, ... `x_10`."""
    mark = f"{_IN_CHUNK}/query/w"
    found = [path.removesuffix(mark).rstrip("/") for path in _flat(params) if f"/{path}".endswith(f"/{mark}")]
    return sorted(found, key=lambda path: re.sub(r"\d+", lambda digits: digits[0].zfill(9), path))


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


def _flat(params: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays by their whole paths."""
    flat: dict[str, Any] = {}
    for path, value in params.items():
        if isinstance(value, Mapping):
            flat |= {f"{path}/{name}": array for name, array in value.items()}
        else:
            flat[path] = value
    return flat


def _haiku_arrays(params: Mapping[str, Any], layer: str | None) -> dict[str, Any]:
    """The arrays of the one attention module in `params` that is meant, by their names relative to it."""
    flat, layers = _flat(params), haiku_layers(params)
    meant = layers if layer is None else [path for path in layers if f"/{path}".endswith(f"/{layer}")]
    if layer in layers:
        meant = [layer]
    if not layers:
        raise InvalidArgument(f"there are 0 arrays named */{_IN_CHUNK}/query/w, there must be one for each layer")
    if len(meant) != 1:
        what = "say which" if layer is None else f"{len(meant)} of them are named {layer!r}"
        raise InvalidArgument(f"there are {len(layers)} layers, {what}: {', '.join(map(repr, layers))}")
    prefix = f"{meant[0]}/" if meant[0] else ""
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
    if array.dtype == np.dtype("V2"):  # NumPy has no bfloat16, and saves JAX's as two bytes of nobody knows what
        array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise InvalidArgument(f"{name!r} has dtype {array.dtype}; it must be float16, bfloat16, float32 or float64")
    native = np.array(array.T, dtype=array.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(native)


def _square(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Summary projections [F, D] as [D, D] ones that give the same logits: with rows of zeros, or multiplied out."""
    feature_size, dim = queries.shape
    if keys.shape != queries.shape or feature_size == dim:  # the former is said where shapes are checked
        return queries, keys
    if feature_size < dim:
        rows = (0, 0, 0, dim - feature_size)
        return functional.pad(queries, rows), functional.pad(keys, rows)
    return (keys.double().T @ queries.double()).to(queries.dtype), torch.eye(dim, dtype=keys.dtype)


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
