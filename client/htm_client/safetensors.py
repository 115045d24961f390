"""The safetensors format in numpy: named tensors and, in the header, one JSON text of parameters.

Layout: 8 bytes length of the header (little-endian), a JSON header padded with spaces, the tensors' bytes.
Does not know what the tensors are for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from htm_client.json_text import dumps

MEDIA_TYPE = "application/x-safetensors"
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "BOOL": np.dtype("?"),
}
_ENCODER = json.JSONEncoder(separators=(",", ":"))
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Array = npt.NDArray[Any]


def dump(tensors: Mapping[str, Array], params: Mapping[str, Any]) -> bytes:
    """Tensors and parameters as bytes. Raises KeyError for a dtype that the format here does not have.

    The widest numbers go first, so that each tensor starts at a multiple of its item size.
    """
    header: dict[str, Any] = {"__metadata__": {"params": dumps(params)}}
    parts: list[bytes] = []
    offset = 0
    for name, array in sorted(tensors.items(), key=lambda item: -item[1].itemsize):
        dtype = array.dtype.newbyteorder("<")
        data = array.astype(dtype, copy=False).tobytes()
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        parts.append(data)
        offset += len(data)
    text = _ENCODER.encode(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def load(data: bytes) -> tuple[dict[str, Array], dict[str, Any]]:
    """The tensors (read-only views of `data`) and the parameters. Raises ValueError for anything else."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ValueError(f"{len(data)} bytes are no safetensors file")
    try:
        header = json.loads(data[8 : 8 + size].decode())
        params = json.loads(header.pop("__metadata__", {}).get("params", "{}"))
        return {name: _tensor(data, 8 + size, entry) for name, entry in header.items()}, params
    except (AttributeError, KeyError, TypeError) as error:  # JSON, but not of this form
        raise ValueError(f"the safetensors header is malformed: {error!r}") from error


def _tensor(data: bytes, origin: int, entry: Mapping[str, Any]) -> Array:
    begin, end = entry["data_offsets"]
    dtype = _DTYPES[entry["dtype"]]
    return np.frombuffer(data, dtype, (end - begin) // dtype.itemsize, origin + begin).reshape(entry["shape"])
