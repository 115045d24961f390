"""A learner's memory: output and all gradients are those of the module over the whole memories."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import htm_pytorch
import numpy as np
import pytest
import torch
from htm_client import HTMClient, InvalidArgument, NotFound
from htm_client.torch import RemoteHTMAttention
from torch import Tensor, nn

from htm_service.attention.modules import HTMAttention, HTMBlock

DIM, SIZE, TOP_K = 6, 5, 2
LENGTHS = (23, 0, 11, 40)
"""Of the sessions: one with an open chunk, one without any token, one with few chunks, one whose chunks are full."""
KINDS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: HTMAttention(DIM, heads=2, topk_mems=TOP_K, mem_chunk_size=SIZE, dim_head=3),
    "block": lambda: HTMBlock(DIM, heads=2, topk_mems=TOP_K, mem_chunk_size=SIZE, dim_head=3, add_pos_enc=False),
    "scaled": lambda: HTMAttention(DIM, heads=1, topk_mems=3, mem_chunk_size=SIZE, dim_head=7, summary_scale=2.0),
    "htm-pytorch": lambda: htm_pytorch.HTMAttention(DIM, heads=2, topk_mems=TOP_K, mem_chunk_size=SIZE, dim_head=3),
    "htm-pytorch-block": lambda: htm_pytorch.HTMBlock(DIM, heads=2, topk_mems=TOP_K, mem_chunk_size=SIZE, dim_head=3),
}


def tokens_of(session: int) -> Tensor:
    generator = torch.Generator().manual_seed(session)
    return torch.randn(LENGTHS[session], DIM, generator=generator)


@pytest.fixture(scope="module")
def client() -> Iterator[HTMClient]:
    with HTMClient(":memory:") as client:
        for session, length in enumerate(LENGTHS):
            client.create_session(str(session), dim=DIM, chunk_size=SIZE)
            if length:
                client.append(str(session), tokens_of(session)[: length // 2], episode=0)
                client.append(str(session), tokens_of(session)[length // 2 :], episode=1)
        yield client


def made(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind]().to(dtype)


def whole(
    module: nn.Module, queries: Tensor, sessions: Sequence[int], visible: Sequence[Any], chunk_mask: Sequence[Any]
) -> Tensor:
    """The module over each session's whole memories, padded at their end; zero for a query that sees nothing."""
    outputs = []
    for row, session in zip(queries, sessions, strict=True):
        length = LENGTHS[session]
        num_chunks = max(-(-length // SIZE), 3)
        memories, mask = (
            torch.zeros(1, num_chunks * SIZE, DIM, dtype=row.dtype),
            torch.zeros(1, num_chunks * SIZE).bool(),
        )
        memories[0, :length], mask[0, :length] = tokens_of(session).to(row.dtype), torch.as_tensor(visible[session])
        chunks = torch.zeros(1, len(row), num_chunks).bool()
        chunks[..., : -(-length // SIZE)] = torch.as_tensor(chunk_mask[session])
        is_whole = bool(mask.all() and chunks.all())
        fields: dict[str, Any] = {} if is_whole else {"mask": mask, "chunk_attn_mask": chunks}
        output = module(row[None], memories, **fields)[0]
        sees = (mask.view(1, num_chunks, SIZE).any(-1)[:, None] & chunks).any(-1)[0, :, None]
        nothing = module.norm(row) if hasattr(module, "norm") else torch.zeros_like(output)  # type: ignore[operator]
        outputs.append(torch.where(sees, output, nothing))
    return torch.stack(outputs)


def gradients(module: nn.Module, queries: Tensor, output: Tensor) -> dict[str, Tensor]:
    names = [name for name, _ in module.named_parameters()]
    found = torch.autograd.grad(
        (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum(),
        [queries, *module.parameters()],
    )
    return dict(zip(["queries", *names], found, strict=True))


CHUNKS = [
    np.random.default_rng(session).random((4, -(-length // SIZE))) < 0.7 for session, length in enumerate(LENGTHS)
]
MASKS = [np.random.default_rng(9 + session).random(length) < 0.6 for session, length in enumerate(LENGTHS)]
ALL = [np.ones(length, bool) for length in LENGTHS]
CASES: dict[str, tuple[dict[str, Any], list[Any], list[Any]]] = {
    "everything": ({}, ALL, [True] * 4),
    "stop and start": (
        {"stop": [11, 0, 9, 31], "start": 3},
        [(np.arange(n) < stop) & (np.arange(n) >= 3) for n, stop in zip(LENGTHS, (11, 0, 9, 31), strict=True)],
        [True] * 4,
    ),
    "episodes": ({"episodes": [1]}, [np.arange(n) >= n // 2 for n in LENGTHS], [True] * 4),
    "masks": ({"mask": MASKS}, MASKS, [True] * 4),
    "chunk masks": ({"chunk_mask": [*CHUNKS[:3], None]}, ALL, [*CHUNKS[:3], True]),
    "both": ({"mask": [None, *MASKS[1:]], "chunk_mask": CHUNKS}, [ALL[0], *MASKS[1:]], CHUNKS),
}
CASES["stop and start"][0]["start"] = [3, 0, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_those_of_the_module(
    client: HTMClient, kind: str, case: str, dtype: torch.dtype
) -> None:
    local, (options, visible, chunk_mask) = made(kind, dtype), CASES[case]
    remote = RemoteHTMAttention(client, copy.deepcopy(local))
    queries = torch.randn(4, 4, DIM, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    expected, got = whole(local, queries, range(4), visible, chunk_mask), remote(queries, list("0123"), **options)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    wanted, found = gradients(local, queries, expected), gradients(remote, queries, got)
    assert {name.removeprefix("attention.") for name in found} == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name.removeprefix("attention.")], rtol=1e-5, atol=1e-5)
    assert any(gradient.abs().max() > 1e-3 for name, gradient in found.items() if "to_summary_keys.weight" in name)


@pytest.mark.parametrize("kind", ["attention", "block"])
def test_gradcheck(client: HTMClient, kind: str) -> None:
    remote = RemoteHTMAttention(client, made(kind))
    names = [name for name, _ in remote.named_parameters()]
    queries = torch.randn(
        2, 1, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True
    )

    def attend(queries: Tensor, *weights: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(
            remote, dict(zip(names, weights, strict=True)), (queries, ["0", "3"]), {"stop": [21, 33]}
        )
        return output

    weights = [parameter.detach().clone().requires_grad_() for parameter in remote.parameters()]
    assert torch.autograd.gradcheck(attend, (queries, *weights), fast_mode=True)  # a call for each number takes 10 s


def test_half_precision_sessions_and_one_query(client: HTMClient) -> None:
    """What is stored is rounded; what is computed from it is not."""
    client.create_session("half", dim=DIM, chunk_size=SIZE, dtype="float16")
    client.append("half", tokens_of(0))
    local = made("attention", torch.float32)
    queries = torch.randn(1, 1, DIM)
    got = RemoteHTMAttention(client, local)(queries, ["half"])
    torch.testing.assert_close(got, local(queries, tokens_of(0).half().float()[None]), rtol=1e-5, atol=1e-5)
    assert client.session("half").num_attends == 0


def test_its_weights_are_the_attentions_own() -> None:
    client = HTMClient("http://127.0.0.1:9")
    remote = RemoteHTMAttention(client, made("block"))
    assert set(remote.state_dict()) == {f"attention.{name}" for name in remote.attention.state_dict()}
    again = pickle.loads(pickle.dumps(remote))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), remote.parameters(), strict=True))


def test_what_does_not_fit_is_refused(client: HTMClient) -> None:
    with pytest.raises(TypeError, match="Linear is no HTMAttention or HTMBlock: it has no to_summary_queries"):
        RemoteHTMAttention(client, nn.Linear(3, 3))
    remote = RemoteHTMAttention(client, made("attention"))
    queries = torch.randn(2, 1, DIM, dtype=torch.float64)
    with pytest.raises(InvalidArgument, match=r"shape \[2, 1, 6\]; for 3 sessions it must be \[3, Q, D\]"):
        remote(queries, ["0", "2", "3"])
    with pytest.raises(InvalidArgument, match="stop is for 3 sessions, there are 2"):
        remote(queries, ["0", "2"], stop=[1, 2, 3])
    with pytest.raises(NotFound):
        remote(queries, ["0", "nobody"])
    client.create_session("other", dim=DIM, chunk_size=SIZE + 1)
    with pytest.raises(InvalidArgument, match="chunks of session 'other' have 6 tokens, the attention's 5"):
        remote(queries, ["0", "other"])
    client.create_session("smaller", dim=DIM, chunk_size=SIZE - 1)
    client.append("smaller", tokens_of(0))
    with pytest.raises(InvalidArgument, match="chunks of session 'smaller' have 4 tokens, the attention's 5"):
        remote(queries, ["0", "smaller"])


@pytest.mark.parametrize("num_queries", [1, 700])
def test_sessions_are_asked_together(client: HTMClient, monkeypatch: pytest.MonkeyPatch, num_queries: int) -> None:
    """In one request, or in as many as their answers need; a session may be there twice."""
    asked: list[int] = []
    batch_select = client.batch_select

    def counting(sessions: Sequence[str], *args: Any, **options: Any) -> Any:
        asked.append(len(sessions))
        return batch_select(sessions, *args, **options)

    monkeypatch.setattr(client, "batch_select", counting)
    local = made("attention")
    queries = torch.randn(5, num_queries, DIM, dtype=torch.float64)
    got = RemoteHTMAttention(client, local)(queries, list("03103"))
    expected = whole(local, queries, [0, 3, 1, 0, 3], ALL, [True] * 4)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert sorted(asked) == ([5] if num_queries == 1 else [1, 2, 2])
    assert RemoteHTMAttention(client, local)(queries[:0], []).shape == (0, num_queries, DIM)
