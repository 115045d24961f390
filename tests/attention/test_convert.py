"""Weights of htm-pytorch, of DeepMind's Haiku module and of our own modules as model files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import htm_pytorch
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from htm_service.attention.convert import convert_file, from_haiku, from_htm_pytorch, from_module
from htm_service.attention.model import ProjectedModel
from htm_service.attention.model_file import load_model, save_model
from htm_service.attention.modules import HTMAttention, HTMBlock
from htm_service.errors import InvalidArgument
from tests.reference import htm_reference, relative_error

HAIKU = "agent/~/hierarchical_memory_attention"


def haiku_params(
    dim: int = 13, seed: int = 5, *, feature_size: int | None = None, width: int | None = None, module: str = HAIKU
) -> dict[str, np.ndarray]:
    """Random parameters of DeepMind's module inside an agent, flat; weights are [in, out], its output has `width`."""
    random, size, out = np.random.default_rng(seed), feature_size or dim, width or dim
    params = {f"{module}/{name}/w": random.normal(size=(dim, size)) for name in ("query", "key")}
    for name, shape in (("query", (dim, size)), ("key", (dim, size)), ("value", (dim, size)), ("linear", (size, out))):
        params[f"{module}/within_mem_attn/{name}/w"] = random.normal(size=shape) / dim**0.5
        params[f"{module}/within_mem_attn/{name}/b"] = random.normal(size=shape[1])
    params["agent/~/policy_head/w"] = random.normal(size=(dim, 3))
    return {name: array.astype(np.float32) for name, array in params.items()}


def haiku_forward(params: dict[str, np.ndarray], query: np.ndarray, chunks: np.ndarray, heads: int, k: int) -> Any:
    """DeepMind's computation for one query [D] and full `chunks` [M, C, D], position encoding on."""
    p = {name.removeprefix(f"{HAIKU}/"): array.astype(np.float64) for name, array in params.items()}
    dim, size = p["query/w"].shape
    keys = chunks.mean(1)
    logits = (keys @ p["key/w"]) @ (query @ p["query/w"]) / np.sqrt(size)
    best = np.argsort(-logits)[:k]
    weights = np.exp(logits[best]) / np.exp(logits[best]).sum()
    frequencies = 1e4 ** (-np.arange(0, dim, 2.0) / dim)
    angles = np.arange(chunks.shape[1] - 1, -1, -1.0)[:, None] * frequencies
    table = np.concatenate((np.sin(angles), np.cos(angles)), -1)[:, :dim]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return np.asarray(x @ p[f"within_mem_attn/{name}/w"] + p[f"within_mem_attn/{name}/b"])

    output = np.zeros(dim)
    for weight, chunk in zip(weights, chunks[best], strict=True):
        q = linear(query, "query").reshape(heads, -1)
        key = linear(chunk + table, "key").reshape(len(chunk), heads, -1)
        value = linear(chunk + table, "value").reshape(len(chunk), heads, -1)
        scores = np.einsum("hd,Thd->hT", q, key) / np.sqrt(size // heads)
        attention = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        output += weight * linear(np.einsum("hT,Thd->hd", attention, value).reshape(-1), "linear")
    return output


class TestHtmPytorch:
    @pytest.mark.parametrize("block", [False, True])
    @pytest.mark.parametrize("position_encoding", [False, True])
    def test_state_dict(self, block: bool, position_encoding: bool) -> None:
        kind = htm_pytorch.HTMBlock if block else htm_pytorch.HTMAttention
        module: nn.Module = kind(22, heads=3, topk_mems=2, mem_chunk_size=5, dim_head=7, add_pos_enc=position_encoding)
        config, tensors = from_htm_pytorch(module.state_dict(), heads=3, chunk_size=5, block=block)
        assert (config.dim, config.dim_head, config.block) == (22, 7, block)
        assert config.position_encoding is position_encoding
        torch.manual_seed(1)
        queries, tokens = torch.randn(3, 22), torch.randn(25, 22)
        with torch.no_grad():
            expected = module(queries[None], tokens[None])[0]
        assert relative_error(htm_reference(queries, tokens, config, tensors).output, expected) <= 1e-5

    @pytest.mark.parametrize(
        ("change", "arguments", "message"),
        [
            ({}, {"heads": 4}, "heads is 4; it must divide the inner width 21"),
            ({}, {"heads": 0}, "heads is 0"),
            ({}, {"heads": 3, "dim_head": 64}, "dim_head is 64; 3 heads in an inner width of 21 have 7"),
            ({}, {"heads": 3, "block": True}, "lacks norm.weight"),
            ({"norm.weight": torch.ones(22)}, {"heads": 3}, "has norm.weight"),
            ({}, {"heads": 3, "position_encoding": False}, "has pos_emb.inv_freqs"),
            ({"pos_emb.inv_freqs": None}, {"heads": 3, "position_encoding": True}, "has no pos_emb.inv_freqs"),
            ({"attn.to_q.weight": None}, {"heads": 3}, "tensor 'attn.to_q.weight' is missing"),
            ({"attn.to_q.weight": torch.ones(21)}, {"heads": 3}, "has shape [21]; it must be a matrix"),
            ({"attn.to_kv.weight": torch.ones(21, 22)}, {"heads": 3}, "'attn.to_kv.weight' has shape [21, 22]"),
            ({"step": 5}, {"heads": 3}, "'step' is a int; a state dict holds tensors"),
            ({"head.weight": torch.ones(3)}, {"heads": 3}, "tensor 'head.weight' is unknown"),
            ({}, {"heads": 3, "top_k": 300}, "top_k is 300"),
        ],
    )
    def test_rejections(self, change: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
        state = dict(htm_pytorch.HTMAttention(22, 3, dim_head=7).state_dict()) | change
        state = {name: value for name, value in state.items() if value is not None}
        with pytest.raises(InvalidArgument, match=re.escape(message)):
            from_htm_pytorch(state, **arguments)


class TestOwnModules:
    @pytest.mark.parametrize("block", [False, True])
    def test_round_trip(self, tmp_path: Path, block: bool) -> None:
        kind = HTMBlock if block else HTMAttention
        module = kind(13, 3, 2, 5, 7, summary_scale=1.7)
        save_model(tmp_path / "planner.safetensors", *from_module(module))
        config = load_model(tmp_path / "planner.safetensors").config
        assert (config.heads, config.top_k, config.chunk_size, config.dim_head) == (3, 2, 5, 7)
        assert (config.block, config.summary_scale, config.position_encoding) == (block, 1.7, True)

    def test_training_on_does_not_change_it(self) -> None:
        module = HTMAttention(13, 3, 2, 5, 7)
        _, tensors = from_module(module)
        before = tensors["attn.to_out.bias"].clone()
        with torch.no_grad():
            module.attn.to_out.bias.add_(1.0)
        assert torch.equal(tensors["attn.to_out.bias"], before)


class TestHaiku:
    @pytest.mark.parametrize("dim", [13, 22])
    def test_output(self, dim: int) -> None:
        heads = 13 if dim == 13 else 11
        params = haiku_params(dim)
        config, tensors = from_haiku(params, heads=heads, top_k=2, chunk_size=5)
        assert (config.dim, config.dim_head, config.block) == (dim, dim // heads, False)
        random = np.random.default_rng(7)
        queries, chunks = random.normal(size=(3, dim)), random.normal(size=(4, 5, dim))
        actual = htm_reference(queries, chunks.reshape(20, dim), config, tensors).output
        expected = np.stack([haiku_forward(params, query, chunks, heads, 2) for query in queries])
        assert relative_error(actual, expected) <= 1e-5

    @pytest.mark.parametrize(("dim", "feature_size"), [(12, 8), (8, 12), (13, 22)])
    def test_a_feature_size_of_its_own(self, dim: int, feature_size: int) -> None:
        """The inner width was taken from the wrong axis, the memories' width: at 12, 8 and 2 heads dim_head was 6."""
        params = haiku_params(dim, feature_size=feature_size)
        config, tensors = from_haiku(params, heads=2, top_k=2, chunk_size=5)
        assert (config.dim, config.dim_head, config.summary_scale) == (dim, feature_size // 2, feature_size**-0.5)
        random = np.random.default_rng(7)
        queries, chunks = random.normal(size=(3, dim)), random.normal(size=(4, 5, dim))
        actual = htm_reference(queries, chunks.reshape(20, dim), config, tensors).output
        expected = np.stack([haiku_forward(params, query, chunks, 2, 2) for query in queries])
        assert relative_error(actual, expected) <= 1e-5
        message = rf"output has width {feature_size}, its memories have {dim}: .* \(dim_head {feature_size // 2}\)"
        with pytest.raises(InvalidArgument, match=message):
            from_haiku(haiku_params(dim, feature_size=feature_size, width=feature_size), heads=2, top_k=2)

    def test_bfloat16_as_numpy_saves_it(self, tmp_path: Path) -> None:
        """NumPy does not know the dtype that JAX's arrays have, and writes it as `|V2`: it was refused."""
        params = haiku_params()
        halves = {name: torch.from_numpy(array).bfloat16() for name, array in params.items()}
        raw = {name: half.view(torch.int16).numpy().view("V2") for name, half in halves.items()}
        np.savez(tmp_path / "in.npz", **raw)  # type: ignore[arg-type]
        with np.load(tmp_path / "in.npz") as loaded:
            assert {array.dtype.str for array in loaded.values()} == {"|V2"}
            found = from_haiku(dict(loaded), heads=1, top_k=2)
        expected = from_haiku({name: half.float().numpy() for name, half in halves.items()}, heads=1, top_k=2)
        assert found[0] == expected[0] and all(torch.equal(found[1][name], its) for name, its in expected[1].items())

    def test_layers(self, tmp_path: Path) -> None:
        """Of several in one file none could be had. Haiku numbers them; the tenth comes after the second."""
        names = [f"{HAIKU}{number}" for number in ("", "_1", "_2", "_10")]
        layers = {name: haiku_params(seed=seed, module=name) for seed, name in enumerate(names)}
        together = {key: array for params in layers.values() for key, array in params.items()}
        one_by_one = [ProjectedModel(*from_haiku(params, heads=1, top_k=2)).hash for params in layers.values()]
        np.savez(tmp_path / "in.npz", **together)  # type: ignore[arg-type]
        made = convert_file(tmp_path / "in.npz", tmp_path / "agent.safetensors", "haiku", heads=1)
        assert [path.name for path in made] == [f"agent-{number}.safetensors" for number in range(4)]
        assert [info.hash for info in made.values()] == one_by_one == [load_model(path).hash for path in made]
        dst = tmp_path / "one.safetensors"
        for name, hash_ in zip(names, one_by_one, strict=True):
            for layer in (name, name.removeprefix("agent/~/")):
                made = convert_file(tmp_path / "in.npz", dst, "haiku", heads=1, layer=layer)
                assert [(path, info.hash) for path, info in made.items()] == [(dst, hash_)]
        with pytest.raises(InvalidArgument, match="there are 4 layers, say which"):
            from_haiku(together, heads=1, top_k=2)
        with pytest.raises(InvalidArgument, match="there are 4 layers, 0 of them are named 'attention'"):
            from_haiku(together, heads=1, top_k=2, layer="attention")
        with pytest.raises(InvalidArgument, match="only haiku parameters have several"):
            convert_file(tmp_path / "in.npz", dst, "htm-pytorch", heads=1, layer="x")

    def test_names(self) -> None:
        """Two levels, no agent around it, float64 and big-endian arrays."""
        flat = haiku_params()
        expected = from_haiku(flat, heads=1, top_k=2)
        nested: dict[str, dict[str, np.ndarray]] = {}
        for name, array in flat.items():
            module, _, kind = name.rpartition("/")
            nested.setdefault(module, {})[kind] = array
        bare = {name.removeprefix(f"{HAIKU}/"): array.astype(">f4") for name, array in flat.items()}
        for params in (nested, bare):
            config, tensors = from_haiku(params, heads=1, top_k=2)
            assert config == expected[0]
            assert all(torch.equal(tensor, expected[1][name]) for name, tensor in tensors.items())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({f"{HAIKU}/key/w": None}, "lacks 'key/w'"),
            ({f"{HAIKU}/within_mem_attn/linear/b": None}, "lacks 'within_mem_attn/linear/b'"),
            ({f"{HAIKU}/layer_norm/scale": np.ones(13)}, "has 'layer_norm/scale', which is unknown"),
            ({f"{HAIKU}/within_mem_attn/query/w": None}, "there are 0 arrays named"),
            ({"other/within_mem_attn/query/w": np.ones((13, 13))}, "there are 2 layers, say which: 'agent/~/"),
            ({f"{HAIKU}/key/w": np.ones((13, 13), np.int32)}, "dtype int32; it must be float16"),
            ({f"{HAIKU}/key/w": np.ones((13, 13), np.longdouble)}, "it must be float16, bfloat16, float32 or float64"),
            ({f"{HAIKU}/key/w": np.ones((7, 13))}, "'to_summary_keys.weight' has shape [13, 7]"),
            ({f"{HAIKU}/within_mem_attn/linear/w": np.ones((13, 7))}, "its output has width 7, its memories have 13"),
        ],
    )
    def test_rejections(self, change: dict[str, Any], message: str) -> None:
        params = {name: array for name, array in (haiku_params() | change).items() if array is not None}
        with pytest.raises(InvalidArgument, match=re.escape(message)):
            from_haiku(params, heads=1, top_k=2)


class TestFiles:
    def test_htm_pytorch(self, tmp_path: Path) -> None:
        module = htm_pytorch.HTMBlock(22, heads=3, dim_head=7)
        sources = [tmp_path / "in.pt", tmp_path / "in.pth", tmp_path / "in.safetensors"]
        for path in sources[:2]:
            torch.save(module.state_dict(), path)
        safetensors.torch.save_file(module.state_dict(), sources[2])
        hashes = set()
        for src in sources:
            dst = tmp_path / f"{src.suffix[1:]}-model.safetensors"
            made = convert_file(src, dst, "htm-pytorch-block", heads=3, dim_head=7, top_k=5, chunk_size=11)
            info = made[dst]
            assert (info.name, info.top_k, info.chunk_size, info.block) == (dst.stem, 5, 11, True)
            assert load_model(dst).hash == info.hash
            hashes.add(info.hash)
        assert len(hashes) == 1

    def test_haiku(self, tmp_path: Path) -> None:
        src, dst = tmp_path / "in.npz", tmp_path / "planner.safetensors"
        params = haiku_params()
        np.savez(src, **params)  # type: ignore[arg-type]
        info = convert_file(src, dst, "haiku", heads=1, top_k=3, position_encoding=False)[dst]
        config, tensors = from_haiku(params, heads=1, top_k=3, position_encoding=False)
        assert info.hash == load_model(dst).hash == ProjectedModel(config, tensors).hash

    @pytest.mark.parametrize("name", ["in.pt", "in.npz", "in.safetensors"])
    def test_damaged(self, tmp_path: Path, name: str) -> None:
        src, dst = tmp_path / name, tmp_path / "out.safetensors"
        with pytest.raises(InvalidArgument, match=f"{name}: cannot be read"):
            convert_file(src, dst, heads=3)
        src.write_bytes(b"garbage of some length")
        with pytest.raises(InvalidArgument, match=f"{name}: is not a"):
            convert_file(src, dst, heads=3)
        assert not dst.exists()

    def test_code_is_never_run(self, tmp_path: Path) -> None:
        """A pickle that would call a function, and an object array, are refused."""
        harm, src = tmp_path / "harm", tmp_path / "in.pt"

        class Evil:
            def __reduce__(self) -> tuple[Any, ...]:
                return (Path.touch, (harm,))

        torch.save({"attn.to_q.weight": Evil()}, src)
        with pytest.raises(InvalidArgument, match=r"in\.pt: is not a \.pt file of tensors"):
            convert_file(src, tmp_path / "out.safetensors", heads=3)
        np.savez(tmp_path / "in.npz", a=np.asarray([Evil()], dtype=object))
        with pytest.raises(InvalidArgument, match=r"in\.npz: is not a"):
            convert_file(tmp_path / "in.npz", tmp_path / "out.safetensors", "haiku", heads=3)
        assert not harm.exists()

    def test_wrong_arguments(self, tmp_path: Path) -> None:
        src, dst = tmp_path / "in.pt", tmp_path / "out.safetensors"
        torch.save(torch.ones(3), src)
        with pytest.raises(InvalidArgument, match="holds a Tensor; it must hold a state dict"):
            convert_file(src, dst, heads=3)
        with pytest.raises(InvalidArgument, match=r"suffix '\.bin'; it must be"):
            convert_file(tmp_path / "in.bin", dst, heads=3)
        with pytest.raises(InvalidArgument, match=r"must end in \.safetensors"):
            convert_file(src, tmp_path / "out.pt", heads=3)
        with pytest.raises(InvalidArgument, match="source is 'onnx'"):
            convert_file(src, dst, "onnx", heads=3)  # type: ignore[arg-type]
        np.savez(tmp_path / "in.npz", **haiku_params())  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match="dim_head is 64"):
            convert_file(tmp_path / "in.npz", dst, "haiku", heads=1, dim_head=64)
