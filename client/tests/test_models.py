"""Weights from where a learner has them: modules of ours and of htm-pytorch, state dicts, files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import htm_pytorch
import numpy as np
import pytest
import safetensors.torch
import torch
from htm_client import AsyncHTMClient, HTMClient, InvalidArgument, ModelConflict, NotFound, SessionConflict
from torch import nn

from htm_service.attention.convert import from_htm_pytorch, from_module
from htm_service.attention.model import ProjectedModel
from htm_service.attention.model_file import save_model
from htm_service.attention.modules import HTMAttention, HTMBlock
from tests.reference import htm_reference, relative_error

DIM = 12


@pytest.fixture
def client() -> Iterator[HTMClient]:
    with HTMClient(":memory:") as client:
        yield client


def modules() -> dict[str, nn.Module]:
    torch.manual_seed(3)
    return {
        "ours": HTMAttention(DIM, heads=2, topk_mems=3, mem_chunk_size=5, dim_head=7, summary_scale=0.4),
        "our block": HTMBlock(DIM, heads=2, topk_mems=3, mem_chunk_size=5, dim_head=7, add_pos_enc=False),
        "theirs": htm_pytorch.HTMAttention(DIM, heads=2, topk_mems=3, mem_chunk_size=5, dim_head=7),
        "their block": htm_pytorch.HTMBlock(DIM, heads=2, topk_mems=3, mem_chunk_size=5, dim_head=7),
    }


def expected(module: nn.Module, **changes: Any) -> ProjectedModel:
    """The model that the server's own converter makes of it."""
    block = hasattr(module, "norm")
    attention: Any = module.attn if block else module
    known = {"heads": 2, "top_k": 3, "chunk_size": 5, "summary_scale": attention.scale, **changes}
    return ProjectedModel(*from_htm_pytorch(module.state_dict(), block=block, **known))


@pytest.mark.parametrize("name", modules())
def test_a_module_tells_all_itself(client: HTMClient, name: str) -> None:
    module = modules()[name]
    model = client.put_model("m", module)
    assert model.hash == expected(module).hash and model.source == "store" and model.num_sessions == 0
    assert ((model.config or {})["heads"], (model.config or {})["top_k"], (model.config or {})["chunk_size"]) == (
        2,
        3,
        5,
    )
    assert [one.name for one in client.models()] == ["m", "retrieval"] and client.model("m") == model
    client.create_session("s", model="m")
    random = np.random.default_rng(1)
    tokens, queries = (random.standard_normal((n, DIM)).astype(np.float32) for n in (23, 3))
    client.append("s", tokens)
    attended = client.attend("s", queries)
    known = expected(module)
    config, tensors = known.config, from_htm_pytorch(module.state_dict(), heads=2, block=known.config.block)[1]
    assert attended.output is not None
    assert relative_error(attended.output, htm_reference(queries, tokens, config, tensors).output) <= 1e-5
    assert (
        attended.model_hash
        == client.recalls("s")[0].model_hash
        == client.explain("s", queries[0]).model_hash
        == model.hash
    )
    with pytest.raises(SessionConflict, match="model_in_use"):
        client.delete_model("m")
    assert client.put_model("m", module, top_k=4).hash == expected(module, top_k=4).hash


def test_state_dicts_and_files(client: HTMClient, tmp_path: Path) -> None:
    module = modules()["ours"]
    state: Any = module.state_dict()
    model = client.put_model("m", state, heads=2, top_k=3, chunk_size=5)
    assert model.hash == expected(module, summary_scale=None).hash
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    assert client.put_model("m", arrays, heads=2, dim_head=7, top_k=3, chunk_size=5).hash == model.hash
    safetensors.torch.save_file(state, tmp_path / "state.safetensors")
    assert client.put_model("m", tmp_path / "state.safetensors", heads=2, top_k=3, chunk_size=5).hash == model.hash
    config, tensors = from_module(module)  # type: ignore[arg-type]
    halved = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_model(tmp_path / "model.safetensors", config, halved)
    assert client.put_model("m", str(tmp_path / "model.safetensors")).hash == ProjectedModel(config, halved).hash
    rounded = {name: tensor.float() for name, tensor in halved.items()}
    as_32 = ProjectedModel(config, rounded).hash
    assert client.put_model("m", module.bfloat16()).hash == as_32, "numpy has no bfloat16: the same numbers as float32"
    with pytest.raises(InvalidArgument, match="says its heads itself"):
        client.put_model("m", tmp_path / "model.safetensors", heads=2)


def test_two_learners(client: HTMClient) -> None:
    first, second = modules()["ours"], modules()["our block"]
    model = client.put_model("m", first, if_new=True)
    with pytest.raises(ModelConflict) as conflict:
        client.put_model("m", second, if_new=True)
    assert conflict.value.hash == model.hash and conflict.value.status == 412
    replaced = client.put_model("m", second, if_match=model.hash)
    with pytest.raises(ModelConflict):
        client.delete_model("m", if_match=model.hash)
    client.delete_model("m", if_match=replaced.hash)
    with pytest.raises(NotFound, match="model_not_found"):
        client.model("m")


async def test_the_async_client_has_the_same() -> None:
    module = modules()["theirs"]
    async with AsyncHTMClient(":memory:") as client:
        model = await client.put_model("m", module, if_new=True)
        assert model.hash == expected(module).hash
        assert [one.name for one in await client.models()] == ["m", "retrieval"] and await client.model("m") == model
        with pytest.raises(ModelConflict):
            await client.put_model("m", module, if_match="another")
        await client.delete_model("m", if_match=model.hash)
        assert [one.name for one in await client.models()] == ["retrieval"]


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ("state", {}, InvalidArgument, "does not tell heads"),
        ("state", {"heads": 3}, InvalidArgument, "heads is 3 and dim_head left out: their product must be .* 14"),
        ("state", {"heads": 2, "dim_head": 8}, InvalidArgument, "heads is 2 and dim_head 8"),
        ("module", {"heads": 7}, InvalidArgument, "heads is 7, the module has 2"),
        ({"a": [1.0]}, {"heads": 1}, InvalidArgument, "no matrix 'attn.to_q.weight'"),
        ({"attn.to_q.weight": ["text"]}, {"heads": 1}, TypeError, "holds floating-point numbers"),
        (nn.Linear(3, 3), {}, TypeError, "Linear is neither an HTMAttention nor an HTMBlock"),
        (7, {}, TypeError, "a module|a model is"),
        ("weights.pt", {}, InvalidArgument, "only .safetensors is read here"),
        ("none.safetensors", {}, FileNotFoundError, "none.safetensors"),
        ("module", {"topk": 3}, TypeError, "put_model has no option 'topk'"),
        ("module", {"if_match": 'a"b'}, InvalidArgument, "must be the hash"),
    ],
)
def test_what_is_no_model_is_not_sent(
    client: HTMClient, source: Any, options: Any, error: type[Exception], message: str
) -> None:
    module = modules()["ours"]
    source = {"state": module.state_dict(), "module": module}.get(source, source) if isinstance(source, str) else source
    with pytest.raises(error, match=message):
        client.put_model("m", source, **options)
    assert [one.name for one in client.models()] == ["retrieval"]
    with pytest.raises(InvalidArgument, match="no model's name"):
        client.put_model("a@b", module)
