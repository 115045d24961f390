"""What every benchmark works on: one seeded model, known to htm-pytorch and to the server, and tokens for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import uvicorn
from htm_pytorch import HTMAttention
from torch import Tensor

from htm_service.attention.convert import from_htm_pytorch
from htm_service.attention.model_file import save_model
from htm_service.config import EngineConfig
from htm_service.engine import Engine
from htm_service.records import AppendRequest, AttendRequest, CreateRequest
from storage.base import DEFAULT_NAMESPACE, SessionKey
from storage.resolve import open_store

DIM, HEADS, DIM_HEAD, TOP_K, CHUNK_SIZE, LENGTH = 512, 8, 64, 8, 32, 20_000
MODEL = "bench"
PIECE = 5_000
"""Tokens of one append, where many are put in."""

T = TypeVar("T")


@dataclass(frozen=True)
class Scene:
    """htm-pytorch with random weights, and where its files lie."""

    directory: Path
    oracle: HTMAttention

    @property
    def models(self) -> Path:
        """The directory of model files."""
        return self.directory / "models"

    @property
    def weights(self) -> Path:
        """The state dict."""
        return self.directory / "weights.pt"

    def forward(self, queries: Tensor, memories: Tensor) -> Tensor:
        """htm-pytorch's answer [Q, D] to queries [Q, D] over tokens [n, D], front-anchored as the server's."""
        padded, mask = _pad_right(memories[None])
        with torch.no_grad():
            answer: Tensor = self.oracle(queries[None], padded, mask=mask)[0]
        return answer


def make_scene(directory: Path) -> Scene:
    """Write the model in both forms."""
    torch.manual_seed(0)
    oracle = HTMAttention(DIM, HEADS, topk_mems=TOP_K, mem_chunk_size=CHUNK_SIZE, dim_head=DIM_HEAD).eval()
    scene = Scene(directory, oracle)
    torch.save(oracle.state_dict(), scene.weights)
    scene.models.mkdir()
    save_model(
        scene.models / f"{MODEL}.safetensors",
        *from_htm_pytorch(oracle.state_dict(), heads=HEADS, dim_head=DIM_HEAD, top_k=TOP_K, chunk_size=CHUNK_SIZE),
    )
    return scene


def make_tokens(length: int, dim: int = DIM) -> Tensor:
    """Seeded random tokens [n, D]."""
    return torch.randn(length, dim, generator=torch.Generator().manual_seed(1))


def make_clustered(length: int, dim: int = DIM) -> Tensor:
    """Unit vectors [n, D], 500 neighbours at a time about as like each other as texts on one subject."""
    random = torch.Generator().manual_seed(4)
    centres = torch.randn(-(-length // 500), dim, generator=random).repeat_interleave(500, dim=0)[:length]
    return torch.nn.functional.normalize(centres + torch.randn(length, dim, generator=random))


def check(got: npt.NDArray[np.float32], expected: Tensor, most: float = 5e-5) -> float:
    """The relative error of an answer. Raises AssertionError when it is above `most`."""
    error = float(np.linalg.norm(got - expected.numpy()) / np.linalg.norm(expected.numpy()))
    assert error <= most, f"the answers differ by {error:.2e}, at most {most:.0e} is allowed"
    return error


@asynccontextmanager
async def running_engine(scene: Scene, url: str, **config: Any) -> AsyncIterator[Engine]:
    """An engine in this process on the store at `url`."""
    store = open_store(url)
    engine = Engine(EngineConfig(models_dir=scene.models, memory_budget_bytes=10 << 30, **config), store)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()
        store.close()


def run(work: Coroutine[Any, Any, T]) -> T:
    """What work in this process answers, on the event loop that the server runs on."""
    with asyncio.Runner(loop_factory=uvicorn.Config("").get_loop_factory()) as runner:
        return runner.run(work)


async def fill(engine: Engine, session: str, tokens: Tensor, model: str = MODEL, dtype: Any = "float32") -> None:
    """Create a session and put tokens [n, D] in."""
    settings = CreateRequest(dim=tokens.shape[1], chunk_size=CHUNK_SIZE, model=model, dtype=dtype)
    await engine.create(named(session), settings)
    for piece in tokens.split(PIECE):
        await engine.append(named(session), AppendRequest(embeddings=piece.numpy()))


def named(session: str) -> SessionKey:
    """A session's name on a server without keys."""
    return SessionKey(DEFAULT_NAMESPACE, session)


def asks(queries: Tensor) -> AttendRequest:
    """A request with these queries [Q, D]."""
    return AttendRequest(queries=queries.numpy())


def _pad_right(memories: Tensor) -> tuple[Tensor, Tensor | None]:
    """htm-pytorch pads on the left; padded on the right and masked it agrees with front-anchored chunks."""
    missing = -memories.shape[1] % CHUNK_SIZE
    if not missing:
        return memories, None
    mask = torch.ones(1, memories.shape[1] + missing, dtype=torch.bool)
    mask[:, memories.shape[1] :] = False
    return torch.nn.functional.pad(memories, (0, 0, 0, missing)), mask
