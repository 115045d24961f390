"""The file of a model: one safetensors file whose metadata holds the config, see docs/attention.md.

Owns: its format and version, and what is said of a file that is wrong.
Does not know: names that models are served under, other people's files (`convert.py`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from htm_service.attention.model import ProjectedModel
from htm_service.attention.model_config import ModelConfig, check_tensors
from htm_service.errors import InvalidArgument

FILE_FORMAT = "htm-service-model"
FILE_VERSION = "1"


def model_bytes(config: ModelConfig, tensors: Mapping[str, Tensor]) -> bytes:
    """The model file as bytes. Raises InvalidArgument when `tensors` are not those of `config`."""
    check_tensors(config, tensors)
    metadata = {"format": FILE_FORMAT, "version": FILE_VERSION, "config": config.to_json()}
    # Copies, because safetensors refuses tensors that share memory.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return safetensors.torch.save(copies, metadata)


def parse_model(data: bytes, source: str, device: torch.device | str = "cpu") -> ProjectedModel:
    """The model in the bytes of a model file; `source` names them in errors.

    Raises InvalidArgument when they are not safetensors, of another format or version, or when the config
    or a tensor is wrong; the message names the source, the tensor or field, its value and what is allowed.
    """
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise InvalidArgument(f"{source}: not a safetensors file: {error}") from error
    (header_bytes,) = struct.unpack_from("<Q", data)
    metadata = json.loads(data[8 : 8 + header_bytes]).get("__metadata__") or {}
    if metadata.get("format") != FILE_FORMAT:
        raise InvalidArgument(
            f"{source}: its metadata says format {metadata.get('format')!r}; a model file says "
            f"{FILE_FORMAT!r} (`htm-service models convert` makes one)"
        )
    if metadata.get("version") != FILE_VERSION:
        raise InvalidArgument(f"{source}: version {metadata.get('version')!r}; this server reads {FILE_VERSION!r}")
    try:
        return ProjectedModel(ModelConfig.from_json(metadata.get("config", "")), tensors, device)
    except InvalidArgument as error:
        raise InvalidArgument(f"{source}: {error.detail}") from error


def save_model(path: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write a model file. Raises InvalidArgument when `tensors` are not those of `config`, and OSError."""
    path.write_bytes(model_bytes(config, tensors))


def load_model(path: Path, device: torch.device | str = "cpu") -> ProjectedModel:
    """Read a model file. Raises InvalidArgument as `parse_model`, also when it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidArgument(f"{path}: cannot be read: {error.strerror}") from error
    return parse_model(data, str(path), device)
