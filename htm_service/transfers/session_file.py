"""The file of a session, see docs/api.md: a safetensors file with everything in it; its header, and what may be wrong.

    8 bytes N | header, N bytes of JSON | episodes | payload_offsets | embeddings | payloads

The widest numbers come first, as safetensors' own writers have it. Checksums stand in the header, so that whoever reads
knows them before the first byte of data. Does not know where bytes come from, nor what a session's settings may be.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import NoneType
from typing import Any

import orjson

from htm_service.dtypes import TORCH_DTYPES, itemsize
from htm_service.errors import InvalidArgument, quoted
from htm_service.records import CreateRequest, DType
from htm_service.session_settings import SessionSettings

FORMAT = "htm-session"
VERSION = 1
MAX_HEADER_BYTES = 1 << 20
"""64 labels of 256 characters each way take half of it."""
NO_EPISODE = -1
MINUS_ONE = -(2**63)
"""How the episode of the number -1 is written, which no other episode can have."""

TENSORS = ("episodes", "payload_offsets", "embeddings", "payloads")
_NAMES: Mapping[str, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_KINDS: Mapping[str, tuple[type, ...]] = {
    "dim": (int,),
    "chunk_size": (int,),
    "model": (str,),
    "dtype": (str,),
    "open_chunk": (str,),
    "labels": (dict,),
    "ttl_s": (int, float, NoneType),
    "on_full": (str,),
    "max_tokens": (int, NoneType),
}
"""Of what type each setting is, in JSON."""


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor: its safetensors dtype, its shape, and where its bytes are among those of all."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """How many bytes it has."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Layout:
    """What the header says but for the checksums: a session's settings, its positions, how many bytes of payloads."""

    settings: Mapping[str, Any]
    """As JSON has them; checked for their types only."""
    first_position: int
    length: int
    num_payload_bytes: int

    @property
    def num_tokens(self) -> int:
        """Tokens in the file."""
        return self.length - self.first_position

    @property
    def dtype(self) -> DType:
        """Of the embeddings."""
        dtype: DType = self.settings["dtype"]
        return dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one embedding."""
        return int(self.settings["dim"]) * itemsize(self.dtype)

    @property
    def places(self) -> dict[str, Place]:
        """The tensors in the order of their bytes."""
        n, dim = self.num_tokens, int(self.settings["dim"])
        sizes = (8 * n, 8 * (n + 1), n * self.token_bytes, self.num_payload_bytes)
        kinds: tuple[tuple[str, tuple[int, ...]], ...] = (
            ("I64", (n,)),
            ("I64", (n + 1,)),
            (_NAMES[self.dtype], (n, dim)),
            ("U8", (self.num_payload_bytes,)),
        )
        places, end = {}, 0
        for name, size, (dtype, shape) in zip(TENSORS, sizes, kinds, strict=True):
            places[name] = Place(dtype, shape, end, end + size)
            end += size
        return places

    @property
    def num_data_bytes(self) -> int:
        """Of all tensors together."""
        return self.places[TENSORS[-1]].stop

    @property
    def wish(self) -> CreateRequest:
        """The settings as someone asks for them."""
        return CreateRequest(**self.settings)

    @property
    def checksum(self) -> str:
        """Of what the header says itself, so that a change of it is noticed too."""
        said = {"settings": dict(self.settings), "first_position": self.first_position, "length": self.length}
        return hashlib.sha256(orjson.dumps(said, option=orjson.OPT_SORT_KEYS)).hexdigest()


def layout_of(settings: SessionSettings, first_position: int, length: int, num_payload_bytes: int) -> Layout:
    """The layout of a session's file."""
    stored = settings.stored() | {"max_tokens": settings.max_tokens}
    return Layout({**stored, "labels": dict(settings.labels)}, first_position, length, num_payload_bytes)


def header(layout: Layout, checksums: Mapping[str, str]) -> bytes:
    """The beginning of a file up to its tensors; `checksums` are SHA-256 of each of them, in hexadecimal."""
    params = {
        "format": FORMAT,
        "version": VERSION,
        "settings": dict(layout.settings),
        "first_position": layout.first_position,
        "length": layout.length,
        "checksums": {**checksums, "params": layout.checksum},
    }
    entries = {
        name: {"dtype": place.dtype, "shape": list(place.shape), "data_offsets": [place.start, place.stop]}
        for name, place in layout.places.items()
    }
    text = orjson.dumps({"__metadata__": {"params": orjson.dumps(params).decode()}, **entries})
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def parse_header(text: bytes) -> tuple[Layout, dict[str, str]]:
    """What a header says, and the checksums of its tensors. Raises InvalidArgument for any other one."""
    found = _object(text, "the header")
    metadata = found.pop("__metadata__", None)
    said = metadata.get("params") if isinstance(metadata, dict) else None
    if not isinstance(said, str):
        raise InvalidArgument("the file is no session's: its header has no __metadata__ with params")
    params = _object(said.encode(errors="replace"), "params")
    if params.get("format") != FORMAT or repr(params.get("version")) != repr(VERSION):  # `true` is no 1
        named = f"format {quoted(str(params.get('format')))}, version {quoted(str(params.get('version')))}"
        raise InvalidArgument(f"the file says {named}; this server reads {FORMAT!r}, version {VERSION}")
    if found.keys() != set(TENSORS):
        raise InvalidArgument(f"the tensors are {quoted(', '.join(sorted(found)))}; they must be {', '.join(TENSORS)}")
    layout = Layout(
        _settings(params.get("settings")),
        _position(params, "first_position"),
        _position(params, "length"),
        _num_payload_bytes(found),
    )
    if layout.first_position > layout.length:
        raise InvalidArgument(f"first_position is {layout.first_position}, beyond length {layout.length}")
    checksums = params.get("checksums")
    if not isinstance(checksums, dict) or checksums.keys() != {*TENSORS, "params"}:
        raise InvalidArgument(f"checksums must be those of params and of {', '.join(TENSORS)}")
    if checksums.pop("params") != layout.checksum:
        raise InvalidArgument("the header does not match its checksum: it was changed")
    for name, place in layout.places.items():
        expected = {"dtype": place.dtype, "shape": list(place.shape), "data_offsets": [place.start, place.stop]}
        if found[name] != expected:
            raise InvalidArgument(f"tensor {name} is {quoted(str(found[name]))}, it must be {expected}")
    return layout, checksums


def _object(text: bytes, what: str) -> dict[str, Any]:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidArgument(f"the file is no session's: {what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidArgument(f"the file is no session's: {what} is not a JSON object")
    return value


def _settings(found: Any) -> dict[str, Any]:
    names = {one.name for one in fields(SessionSettings)}
    if not isinstance(found, dict) or found.keys() != names:
        raise InvalidArgument(f"settings must be {', '.join(sorted(names))}, all of them and no others")
    for name, kinds in _KINDS.items():
        if type(found[name]) not in kinds:
            raise InvalidArgument(f"{name} is {quoted(str(found[name]))}, which is none of its type")
    if not all(isinstance(value, str) for value in found["labels"].values()):
        raise InvalidArgument("labels must be texts")
    if found["dtype"] not in TORCH_DTYPES or found["open_chunk"] not in ("attend", "exclude"):
        raise InvalidArgument(f"dtype is {quoted(found['dtype'])}, open_chunk {quoted(found['open_chunk'])}")
    if not 1 <= found["dim"] <= 2**31:
        raise InvalidArgument(f"dim is {found['dim']}, it must be 1 or more")
    return found


def _position(params: Mapping[str, Any], name: str) -> int:
    value = params.get(name)
    if type(value) is not int or not 0 <= value <= 2**53:
        raise InvalidArgument(f"{name} is {quoted(str(value))}, it must be 0 to {2**53}")
    return value


def _num_payload_bytes(entries: Mapping[str, Any]) -> int:
    entry = entries.get("payloads")
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or list(map(type, shape)) != [int] or not 0 <= shape[0] <= 2**62:
        raise InvalidArgument(f"tensor payloads has shape {quoted(str(shape))}, it must be [number of bytes]")
    return int(shape[0])
