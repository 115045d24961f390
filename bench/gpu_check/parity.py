"""A real server's answers beside the definition in float64: `--device cuda --dtype bfloat16`.

Partly filled chunks, masks, episodes, time travel, several models, a budget of a few pages so that chunks have to leave
the device and come back, and all of it again after a restart. Prints the largest relative errors.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from htm_client import HTMClient

from bench import processes
from htm_service.attention.model_config import ModelConfig
from htm_service.attention.model_file import save_model
from htm_service.records import DType
from tests.reference import htm_reference, relative_error

HEADS, DIM_HEAD, TOP_K, CHUNK_SIZE = 4, 16, 5, 32
TOLERANCE: dict[DType, float] = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-2}
SCALE = 0.3
"""Of the built-in model, on tokens that are no unit vectors."""
RETRIEVAL = ModelConfig(
    dim=None,
    heads=1,
    dim_head=None,
    top_k=8,
    chunk_size=CHUNK_SIZE,
    position_encoding=False,
    summary_scale=SCALE,
    attention_scale=SCALE,
)
Floats = np.ndarray[Any, np.dtype[np.float32]]


def make_model(folder: Path, dim: int) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """A model of random weights, as a file."""
    draw = torch.Generator().manual_seed(3)
    inner = HEADS * DIM_HEAD
    shapes = {
        "to_summary_queries.weight": (dim, dim),
        "to_summary_queries.bias": (dim,),
        "to_summary_keys.weight": (dim, dim),
        "to_summary_keys.bias": (dim,),
        "attn.to_q.weight": (inner, dim),
        "attn.to_kv.weight": (2 * inner, dim),
        "attn.to_out.weight": (dim, inner),
        "attn.to_out.bias": (dim,),
    }
    tensors = {
        name: torch.randn(*shape, generator=draw) / (shape[-1] ** 0.5 if len(shape) == 2 else 10)
        for name, shape in shapes.items()
    }
    config = ModelConfig(dim=dim, heads=HEADS, dim_head=DIM_HEAD, top_k=TOP_K, chunk_size=CHUNK_SIZE)
    folder.mkdir()
    save_model(folder / "random.safetensors", config, tensors)
    return config, tensors


@contextmanager
def serving(folder: Path, device: str, budget: int) -> Iterator[str]:
    """A server on the folder; its address."""
    port = processes.free_port()
    command = [sys.executable, "-m", "api", "serve", "--port", str(port), "--device", device]
    command += ["--data", str(folder / "data"), "--models-dir", str(folder / "models")]
    command += ["--memory-budget", str(budget), "--log-level", "warning"]
    command += ["--retrieval-summary-scale", str(SCALE), "--retrieval-attention-scale", str(SCALE)]
    with processes.process(command):
        processes.wait_for(f"http://127.0.0.1:{port}/readyz")
        yield f"http://127.0.0.1:{port}"


def questions(length: int, queries: Floats) -> list[dict[str, Any]]:
    """What is asked: each a set of an attend's fields."""
    draw = np.random.default_rng(5)
    chunks = -(-length // CHUNK_SIZE)
    cut = length - CHUNK_SIZE - 3
    return [
        {},
        {"top_k": 1},
        {"top_k": 2 * TOP_K},
        {"stop": cut},
        {"start": CHUNK_SIZE + 5, "stop": cut},
        {"mask": draw.random(length) < 0.5},
        {"chunk_mask": draw.random((len(queries), chunks)) < 0.5},
        {"stop": cut, "mask": draw.random(cut) < 0.3},
        {"mask": np.zeros(length, np.bool_)},
    ]


def expected(tokens: Floats, queries: Floats, fields: dict[str, Any], config: ModelConfig, weights: Any) -> Any:
    """The definition's answer."""
    stop, start = fields.get("stop", len(tokens)), fields.get("start", 0)
    mask = np.ones(stop, np.bool_) if (given := fields.get("mask")) is None else np.array(given)
    mask[:start] = False
    return htm_reference(
        queries,
        tokens[:stop],
        config,
        weights,
        chunk_size=CHUNK_SIZE,
        top_k=fields.get("top_k", config.top_k),
        visible=mask,
        chunk_mask=fields.get("chunk_mask"),
    ).output


def check(client: HTMClient, tokens: Floats, queries: Floats, models: Any, dtype: DType) -> dict[str, float]:
    """All questions to all models; the largest error of each. Raises AssertionError for one above the tolerance."""
    errors: dict[str, float] = {}
    for name, (config, weights) in models.items():
        for fields in questions(len(tokens), queries):
            answer = client.attend("s", queries, model=name, **fields).output
            assert answer is not None
            error = relative_error(answer, expected(tokens, queries, fields, config, weights))
            assert error <= TOLERANCE[dtype], f"model {name}, {sorted(fields)}: the answers differ by {error:.2e}"
            errors[name] = max(errors.get(name, 0.0), error)
    return errors


def measure(device: str, dtype: DType, dim: int, length: int, budget: int) -> dict[str, Any]:
    """Fill, ask, restart, ask again."""
    draw = np.random.default_rng(4)
    tokens = draw.standard_normal((length, dim)).astype(np.float32)
    queries = (draw.standard_normal((3, dim)) / 2).astype(np.float32)
    stored = torch.from_numpy(tokens).to(getattr(torch, dtype)).float().numpy()  # as the session keeps them
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        models: dict[str, Any] = {"random": make_model(folder / "models", dim), "retrieval": (RETRIEVAL, None)}
        with serving(folder, device, budget) as url, HTMClient(url, timeout=60) as client:
            client.create_session("s", dim=dim, chunk_size=CHUNK_SIZE, dtype=dtype, model="random")
            for first in range(0, length, 301):
                client.append("s", tokens[first : first + 301])
            before = check(client, stored, queries, models, dtype)
            info = client.info()
        with serving(folder, device, budget) as url, HTMClient(url, timeout=60) as client:
            after = check(client, stored, queries, models, dtype)
            again = client.info()
    return {
        "device": device,
        "kernel": info["kernel"],
        "dtype": dtype,
        "errors": before,
        "errors_after_restart": after,
        "fetched_pages": info["totals"]["fetched_pages"] + again["totals"]["fetched_pages"],
        "offloaded_pages": info["totals"]["offloaded_pages"] + again["totals"]["offloaded_pages"],
    }


def main() -> None:
    """As the command says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float32", choices=sorted(TOLERANCE))
    options = parser.parse_args()
    budget = (1 << 20) if options.dtype != "float32" else (2 << 20)
    found = measure(options.device, options.dtype, dim=256, length=3_007, budget=budget)
    print(json.dumps(found))
    assert found["fetched_pages"] > 0 and found["offloaded_pages"] > 0, "nothing left the device: too large a budget"


if __name__ == "__main__":
    main()
