"""Served answers equal htm-pytorch's, in both formats, before and after a restart."""

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from htm_client import HTMClient
from htm_pytorch import HTMAttention, HTMBlock

from htm_service.attention.convert import convert_file
from tests.reference import relative_error
from tests.served.server import Server

LENGTH, CHUNKS = 60, 12
SHAPES = [("a", 26, 2, 7, 3, 5), ("b", 64, 4, 16, 5, 5), ("c", 10, 3, 11, 12, 5)]


@pytest.mark.parametrize("block", [False, True], ids=["attention", "block"])
def test_converted_weights_answer_as_htm_pytorch(server: Server, tmp_path: Path, block: bool) -> None:
    torch.manual_seed(7)
    modules = {}
    for name, dim, heads, dim_head, top_k, chunk_size in SHAPES:
        kind = HTMBlock if block else HTMAttention
        module = kind(dim, heads=heads, dim_head=dim_head, topk_mems=top_k, mem_chunk_size=chunk_size).eval()
        torch.save(module.state_dict(), tmp_path / f"{name}.pt")
        convert_file(
            tmp_path / f"{name}.pt",
            server.models / f"{name}.safetensors",
            source="htm-pytorch-block" if block else "htm-pytorch",
            heads=heads,
            dim_head=dim_head,
            top_k=top_k,
            chunk_size=chunk_size,
        )
        modules[name] = (module, dim)
    server.start()
    memories = {name: torch.randn(1, LENGTH, dim) for name, (_, dim) in modules.items()}
    queries = {name: torch.randn(1, 3, dim) for name, (_, dim) in modules.items()}
    mask = torch.rand(1, LENGTH) < 0.7
    mask[0, 10:15] = False  # a chunk with nothing visible
    chunk_mask = torch.rand(1, 3, CHUNKS) < 0.95
    answers: dict[tuple[str, bool], object] = {}
    for binary in (True, False):
        with HTMClient(server.url, binary=binary) as client:
            for name in modules:
                client.create_session(name, model=name)
                if binary:
                    client.append(name, memories[name][0, :37])
                    client.append(name, memories[name][0, 37:])
            for turn in ("before", "after"):
                for name, (module, _) in modules.items():
                    plain = client.attend(name, queries[name][0]).output
                    masked = client.attend(name, queries[name][0], mask=mask[0], chunk_mask=chunk_mask[0]).output
                    assert plain is not None and masked is not None
                    with torch.no_grad():
                        expected = module(queries[name], memories[name])[0].numpy()
                        expected_masked = _masked(module, queries[name], memories[name], mask, chunk_mask)
                    assert relative_error(plain, expected) <= 1e-5, (name, turn)
                    assert relative_error(masked, expected_masked) <= 1e-5, (name, turn)
                    if (name, binary) in answers:
                        np.testing.assert_array_equal(plain, answers[name, binary])
                    answers[name, binary] = plain
                if turn == "before":
                    server.restart(signal.SIGTERM if binary else signal.SIGKILL)


def _masked(
    module: torch.nn.Module, queries: torch.Tensor, memories: torch.Tensor, mask: torch.Tensor, chunk_mask: torch.Tensor
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """htm-pytorch with the exact mean: its 1e-5 beside the count gone, but for an empty chunk's 0 / 0."""
    (module.attn if isinstance(module, HTMBlock) else module).eps = 1e-30
    output: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = module(
        queries, memories, mask=mask, chunk_attn_mask=chunk_mask
    )[0].numpy()
    return output
