"""The service one would write in an afternoon: htm-pytorch inside FastAPI, JSON in and out. The yardstick."""

from __future__ import annotations

import argparse
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from htm_pytorch import HTMAttention
from pydantic import BaseModel


class Query(BaseModel):
    queries: list[list[float]]


def make_app(dim: int, heads: int, dim_head: int, top_k: int, chunk_size: int, length: int, weights: str) -> FastAPI:
    """One memory [1, n, D] of random tokens, seeded; the weights from a state dict file."""
    app = FastAPI()
    model = HTMAttention(dim, heads, topk_mems=top_k, mem_chunk_size=chunk_size, dim_head=dim_head)
    model.load_state_dict(torch.load(weights, weights_only=True))
    model.eval()
    torch.manual_seed(1)
    memories = torch.randn(1, length, dim)

    @app.post("/attend")
    def attend(query: Query) -> dict[str, Any]:
        with torch.no_grad():
            return {"output": model(torch.tensor([query.queries]), memories)[0].tolist()}

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("dim", "heads", "dim-head", "top-k", "chunk-size", "length", "port"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--weights", required=True)
    options = vars(parser.parse_args())
    port = options.pop("port")
    uvicorn.run(make_app(**options), host="127.0.0.1", port=port, log_level="warning")
