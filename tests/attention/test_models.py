"""Folded models against HTMAttention and the reference, their files, their names."""

from __future__ import annotations

import json
import math
import os
import re
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from htm_service.attention.convert import from_module
from htm_service.attention.model import Model, ProjectedModel, RetrievalModel
from htm_service.attention.model_config import ModelConfig
from htm_service.attention.model_file import load_model, model_bytes, parse_model, save_model
from htm_service.attention.modules import HTMAttention, HTMBlock
from htm_service.attention.positions import position_table
from htm_service.attention.registry import ModelRegistry
from htm_service.errors import QUOTED_CHARACTERS, InvalidArgument, ModelNotFound
from htm_service.kernels.base import Search, View
from htm_service.kernels.reference import ReferenceKernel
from htm_service.kernels.resolve import resolve_kernel
from htm_service.memory.arena import Arena, Budget
from tests.reference import htm_reference, relative_error

CONFIG = ModelConfig(dim=13, heads=3, dim_head=7, top_k=2, chunk_size=5)
BLOCK = replace(CONFIG, block=True)
KERNEL = ReferenceKernel()


def make_tensors(config: ModelConfig, seed: int = 1, biases: bool = True) -> dict[str, Tensor]:
    """Random tensors for `config`, all optional biases among them unless `biases` is False."""
    assert config.dim is not None and config.dim_head is not None
    dim, inner = config.dim, config.heads * config.dim_head
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / math.sqrt(shape[-1])

    tensors = {
        "to_summary_queries.weight": draw(dim, dim),
        "to_summary_keys.weight": draw(dim, dim),
        "attn.to_q.weight": draw(inner, dim),
        "attn.to_kv.weight": draw(2 * inner, dim),
        "attn.to_out.weight": draw(dim, inner),
        "attn.to_out.bias": draw(dim),
    }
    if biases:
        tensors |= {
            "to_summary_queries.bias": draw(dim),
            "to_summary_keys.bias": draw(dim),
            "attn.to_q.bias": draw(inner),
            "attn.to_kv.bias": draw(2 * inner),
        }
    if config.block:
        tensors |= {"norm.weight": 1 + draw(dim), "norm.bias": draw(dim)}
    return tensors


def view_of(model: Model, tokens: Tensor, chunk_size: int, top_k: int, num_queries: int) -> View:
    """All of one session's `tokens` [n, D], for as many queries."""
    arena = Arena(tokens.shape[1], chunk_size, torch.float32, torch.device("cpu"), Budget(1 << 20))
    chunks = tokens.split(chunk_size) if len(tokens) else ()
    pages = arena.allocate(len(chunks))
    for page, chunk in zip(pages, chunks, strict=True):
        arena.page(page)[: len(chunk)] = chunk
    keys = torch.stack([chunk.mean(0) for chunk in chunks]) if chunks else tokens.new_zeros(0, tokens.shape[1])
    k = min(top_k, len(chunks))
    search = Search(keys, torch.tensor(pages, dtype=torch.int64), 0, 0, len(tokens), num_queries, k)
    return View(arena, model.positions(chunk_size), [search])


def attend_all(model: Model, queries: Tensor, tokens: Tensor, chunk_size: int, top_k: int) -> Tensor:
    """What the serving path answers `queries` [R, D] from one session's `tokens` [n, D]: [R, D]."""
    _, output = model.answer(queries, view_of(model, tokens, chunk_size, top_k, len(queries)), KERNEL)
    return output


class TestFolding:
    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(
        seed=st.integers(0, 2**31),
        num_tokens=st.integers(0, 37),
        dim=st.sampled_from([13, 22]),
        heads=st.sampled_from([1, 3]),
        top_k=st.sampled_from([1, 2, 11]),
        position_encoding=st.booleans(),
        block=st.booleans(),
    )
    def test_equals_the_module(
        self, seed: int, num_tokens: int, dim: int, heads: int, top_k: int, position_encoding: bool, block: bool
    ) -> None:
        torch.manual_seed(seed)
        kind = HTMBlock if block else HTMAttention
        module = kind(dim, heads, top_k, 5, 7, position_encoding)
        model = ProjectedModel(*from_module(module))
        queries, tokens = torch.randn(3, dim), torch.randn(num_tokens, dim)
        with torch.no_grad():
            expected = module(queries[None], tokens[None])[0]
        assert relative_error(attend_all(model, queries, tokens, 5, top_k), expected) <= 1e-5

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 2**31), biases=st.booleans(), block=st.booleans(), num_tokens=st.integers(1, 37))
    def test_equals_the_reference(self, seed: int, biases: bool, block: bool, num_tokens: int) -> None:
        """Also with the biases of DeepMind's module, which HTMAttention does not have."""
        config = replace(CONFIG, block=block, top_k=3)
        tensors = make_tensors(config, seed, biases)
        torch.manual_seed(seed)
        queries, tokens = torch.randn(3, 13), torch.randn(num_tokens, 13)
        output = attend_all(ProjectedModel(config, tensors), queries, tokens, 5, 3)
        assert relative_error(output, htm_reference(queries, tokens, config, tensors).output) <= 1e-5

    @pytest.mark.parametrize("num_tokens", [0, 3, 31])
    def test_retrieval_equals_the_reference(self, num_tokens: int) -> None:
        model = RetrievalModel(top_k=3)
        torch.manual_seed(2)
        queries, tokens = (torch.nn.functional.normalize(torch.randn(n, 13)) for n in (5, num_tokens))
        expected = htm_reference(queries, tokens, model.config, chunk_size=5)
        assert relative_error(attend_all(model, queries, tokens, 5, 3), expected.output) <= 1e-5
        assert expected.token_weight.sum(1) == pytest.approx(np.ones(5) if num_tokens else np.zeros(5))

    def test_scales(self) -> None:
        config = replace(CONFIG, summary_scale=3.0, attention_scale=2.0)
        tensors = make_tensors(config)
        torch.manual_seed(3)
        queries, tokens = torch.randn(3, 13), torch.randn(31, 13)
        output = attend_all(ProjectedModel(config, tensors), queries, tokens, 5, 2)
        assert relative_error(output, htm_reference(queries, tokens, config, tensors).output) <= 1e-5

    @pytest.mark.parametrize("block", [False, True])
    @pytest.mark.parametrize("kernel", ["reference", "compiled"])
    def test_nothing_visible(self, block: bool, kernel: str) -> None:
        """Such a row is zero, or the normed query, whatever lies in the arena; others are untouched."""
        config = replace(CONFIG, block=block)
        tensors = make_tensors(config)
        queries, tokens = torch.randn(3, 13), torch.randn(11, 13)
        hidden = torch.zeros(3, 3, dtype=torch.bool)
        hidden[1] = True
        for model in (ProjectedModel(config, tensors), RetrievalModel()):
            view = view_of(model, tokens, 5, 2, 3)
            masked = replace(view, searches=[replace(view.searches[0], hidden=hidden)])
            view.arena.page(2)[1:] = math.nan  # slots that were never written
            resolved = resolve_kernel(torch.device("cpu"), kernel)
            (_, seen), (attended, output) = (model.answer(queries, each, resolved) for each in (view, masked))
            nothing = torch.zeros(13)
            if model.config.block:
                nothing = torch.nn.functional.layer_norm(
                    queries[1], (13,), tensors["norm.weight"], tensors["norm.bias"]
                )
            torch.testing.assert_close(output[1], nothing)
            torch.testing.assert_close(output[::2], seen[::2])
            assert torch.equal(model.select(queries, masked, resolved), attended.chunk_index)

    def test_no_rows(self) -> None:
        for model in (ProjectedModel(CONFIG, make_tensors(CONFIG)), RetrievalModel()):
            summary, heads = model.fold(torch.zeros(0, 13), KERNEL)
            assert summary.shape == (0, 13) and heads.shape == (0, model.heads, 13)

    def test_arguments_are_unchanged(self) -> None:
        for model in (ProjectedModel(BLOCK, make_tensors(BLOCK)), RetrievalModel()):
            queries, tokens = torch.randn(3, 13), torch.randn(11, 13)
            view = view_of(model, tokens, 5, 2, 3)
            given = (queries, view.searches[0].keys, view.arena.take(torch.arange(3)))
            before = [tensor.clone() for tensor in given]
            model.answer(queries, view, KERNEL)
            model.select(queries, view, KERNEL)
            after = (queries, view.searches[0].keys, view.arena.take(torch.arange(3)))
            assert all(map(torch.equal, before, after))

    def test_positions(self) -> None:
        """The last slot is position 0: sines 0, cosines 1; slot 0 is position C - 1."""
        model = ProjectedModel(CONFIG, make_tensors(CONFIG))
        table = model.positions(5)
        assert table is not None and table.shape == (5, 13)
        assert table[4].tolist() == [0.0] * 7 + [1.0] * 6
        assert table[0, :2].tolist() == pytest.approx([math.sin(4), math.sin(4 * 10_000 ** (-2 / 13))])
        assert model.positions(5) is table
        plain = ProjectedModel(replace(CONFIG, position_encoding=False), make_tensors(CONFIG))
        assert plain.positions(5) is None
        assert RetrievalModel().positions(5) is None

    def test_many_chunk_sizes_do_not_pile_up(self) -> None:
        model = ProjectedModel(CONFIG, make_tensors(CONFIG))
        tables = []
        for chunk_size in range(1, 200):
            table = model.positions(chunk_size)
            assert table is not None and torch.equal(table, position_table(chunk_size, 13))
            tables.append(weakref.ref(table))
            del table
        assert sum(table() is not None for table in tables) <= 64

    def test_to_the_same_device(self) -> None:
        for model in (ProjectedModel(CONFIG, make_tensors(CONFIG)), RetrievalModel()):
            assert model.to("cpu") is model

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_to_cuda(self) -> None:
        for model in (ProjectedModel(CONFIG, make_tensors(CONFIG)), RetrievalModel(top_k=3)):
            queries = torch.randn(5, 13)
            moved = model.to("cuda")
            assert (moved.hash, moved.config) == (model.hash, model.config)
            for actual, expected in zip(moved.fold(queries.cuda(), KERNEL), model.fold(queries, KERNEL), strict=True):
                assert relative_error(actual, expected) <= 1e-5


class TestIdentity:
    def test_hash_is_of_the_content(self) -> None:
        tensors = make_tensors(CONFIG)
        model = ProjectedModel(CONFIG, tensors)
        backwards = dict(reversed(tensors.items()))
        explicit = replace(CONFIG, summary_scale=13**-0.5)
        assert ProjectedModel(explicit, backwards).hash == model.hash
        assert ProjectedModel(replace(CONFIG, top_k=3), tensors).hash != model.hash
        changed = tensors | {"attn.to_out.bias": tensors["attn.to_out.bias"] + 1e-3}
        assert ProjectedModel(CONFIG, changed).hash != model.hash
        halved = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        assert ProjectedModel(CONFIG, halved).hash != model.hash

    def test_hash_never_changes(self) -> None:
        """Golden: a change of it would make every stored hash another model's."""
        config = ModelConfig(dim=2, heads=1, dim_head=1, top_k=1, chunk_size=3)
        shapes = {name: tensor.shape for name, tensor in make_tensors(config, biases=False).items()}
        tensors = {name: torch.full(shape, 0.5) for name, shape in shapes.items()}
        assert (
            ProjectedModel(config, tensors).hash == "e10255f8f0912e6125d8db905fc709846fb49ab48c514cfc8a44de30e0ba7feb"
        )
        assert RetrievalModel().hash == "4e2718460261b5363c6a20fefd8139b085ef9264af400e952147f2288220c0a5"

    def test_info(self) -> None:
        info = ProjectedModel(CONFIG, make_tensors(CONFIG)).info("planner")
        assert (info.name, info.dim, info.heads, info.dim_head, info.top_k) == ("planner", 13, 3, 7, 2)
        assert (info.summary_scale, info.attention_scale) == (13**-0.5, 7**-0.5)
        assert RetrievalModel().info("retrieval").dim is None


class TestFile:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_round_trip(self, tmp_path: Path, dtype: torch.dtype) -> None:
        config = replace(CONFIG, block=True, summary_scale=0.3)
        tensors = {name: tensor.to(dtype) for name, tensor in make_tensors(config).items()}
        path = tmp_path / "planner.safetensors"
        save_model(path, config, tensors)
        model, original = load_model(path), ProjectedModel(config, tensors)
        assert (model.config, model.hash) == (config, original.hash)
        queries = torch.randn(3, 13)
        for actual, expected in zip(model.fold(queries, KERNEL), original.fold(queries, KERNEL), strict=True):
            assert torch.equal(actual, expected)

    def test_tensors_that_share_memory(self) -> None:
        tensors = make_tensors(CONFIG)
        tensors["to_summary_keys.weight"] = tensors["to_summary_queries.weight"].T
        model = parse_model(model_bytes(CONFIG, tensors), "upload")
        assert model.hash == ProjectedModel(CONFIG, tensors).hash

    def test_absent_fields_have_defaults(self) -> None:
        config = ModelConfig.from_json('{"dim": 13, "dim_head": 64}')
        assert config == ModelConfig(dim=13)

    @pytest.mark.parametrize("data", [b"", b"not safetensors", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}trailing"])
    def test_not_safetensors(self, data: bytes) -> None:
        with pytest.raises(InvalidArgument, match="upload: not a safetensors file"):
            parse_model(data, "upload")

    def test_truncated(self) -> None:
        with pytest.raises(InvalidArgument, match="upload: not a safetensors file"):
            parse_model(model_bytes(CONFIG, make_tensors(CONFIG))[:-1], "upload")

    @pytest.mark.parametrize(
        ("metadata", "message"),
        [
            (None, "format None; a model file says 'htm-service-model'"),
            ({"format": "pt"}, "format 'pt'"),
            ({"version": "2"}, "version '2'; this server reads '1'"),
            ({"config": "{"}, "config is not JSON"),
            ({"config": "[" * 100_000}, "config is not JSON"),
            ({"config": "[]"}, "config is a JSON list; it must be an object"),
            ({"config": "{}"}, "config field 'dim' is missing"),
        ],
    )
    def test_metadata(self, metadata: dict[str, str] | None, message: str) -> None:
        whole = {"format": "htm-service-model", "version": "1", "config": CONFIG.to_json()}
        data = safetensors.torch.save(make_tensors(CONFIG), None if metadata is None else whole | metadata)
        with pytest.raises(InvalidArgument, match=f"^upload: .*{re.escape(message)}"):
            parse_model(data, "upload")

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("dim", 0, "dim is 0; it must be a whole number from 1 to 16384"),
            ("dim", 13.0, "dim is 13.0"),
            ("dim", None, "'dim' is missing"),
            ("heads", True, "heads is True; it must be a whole number from 1 to 1024"),
            ("heads", 2000, "heads is 2000"),
            ("dim_head", None, "'dim_head' is missing"),
            ("dim_head", -7, "dim_head is -7"),
            ("top_k", 257, "top_k is 257; it must be a whole number from 1 to 256"),
            ("chunk_size", "32", "chunk_size is '32'; it must be a whole number from 1 to 4096"),
            ("position_encoding", 1, "position_encoding is 1; it must be true or false"),
            ("block", "no", "block is 'no'"),
            ("summary_scale", 0, "summary_scale is 0; it must be a number above 0, at most 1000000"),
            ("summary_scale", 10**400, "it must be a number above 0"),
            ("attention_scale", math.nan, "attention_scale is nan"),
            ("attention_scale", True, "attention_scale is True"),
            ("temperature", 1, "config field 'temperature' is unknown"),
            ("t" * 9999, 1, f"config field '{'t' * QUOTED_CHARACTERS}...' is unknown"),
            ("heads", "h" * 9999, f"heads is 'h{'h' * (QUOTED_CHARACTERS - 2)}...; it must be"),
        ],
    )
    def test_config(self, field: str, value: object, message: str) -> None:
        text = json.dumps(json.loads(CONFIG.to_json()) | {field: value})
        with pytest.raises(InvalidArgument, match=re.escape(message)):
            ModelConfig.from_json(text)

    def test_model_without_weights_has_no_defaults(self) -> None:
        with pytest.raises(InvalidArgument, match="summary_scale is null"):
            ModelConfig(dim=None, position_encoding=False, attention_scale=1.0)
        with pytest.raises(InvalidArgument, match="dim is null"):
            ModelConfig(dim=None, position_encoding=True, summary_scale=1.0, attention_scale=1.0)

    @pytest.mark.parametrize(
        ("name", "tensor", "message"),
        [
            ("attn.to_q.weight", None, "tensor 'attn.to_q.weight' is missing"),
            ("attn.to_out.bias", None, "tensor 'attn.to_out.bias' is missing"),
            ("norm.weight", torch.ones(13), "tensor 'norm.weight' is unknown"),
            ("attn.to_q.weight", torch.ones(13, 21), "has shape [13, 21]; dim 13, heads 3 and dim_head 7"),
            ("attn.to_q.bias", torch.ones(13), "'attn.to_q.bias' has shape [13]"),
            ("attn.to_out.bias", torch.ones(13, dtype=torch.int32), "dtype int32; it must be one of float64"),
            ("attn.to_out.bias", torch.full((13,), math.nan), "'attn.to_out.bias' has 13 values"),
            ("attn.to_out.bias", torch.full((13,), 1e300, dtype=torch.float64), "not finite in float32"),
        ],
    )
    def test_tensors(self, tmp_path: Path, name: str, tensor: Tensor | None, message: str) -> None:
        """The message names the file; saving such a model is refused too."""
        tensors = make_tensors(CONFIG)
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
        with pytest.raises(InvalidArgument, match=re.escape(message)):
            model_bytes(CONFIG, tensors)
        path = tmp_path / "bad.safetensors"
        metadata = {"format": "htm-service-model", "version": "1", "config": CONFIG.to_json()}
        path.write_bytes(safetensors.torch.save(tensors, metadata))
        with pytest.raises(InvalidArgument, match=f"{re.escape(str(path))}: .*{re.escape(message)}"):
            load_model(path)

    def test_weights_that_overflow_once_folded(self) -> None:
        """Finite ones whose product is not: every attend was refused, and its queries were blamed."""
        tensors = make_tensors(CONFIG)
        for name in ("to_summary_queries.weight", "to_summary_keys.weight"):
            tensors[name] = torch.full_like(tensors[name], 1e20)
        with pytest.raises(
            InvalidArgument, match=r"upload: what the weights fold to overflows float32: summary has 3\.6"
        ):
            parse_model(model_bytes(CONFIG, tensors), "upload")

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidArgument, match=r"none\.safetensors: cannot be read: No such file"):
            load_model(tmp_path / "none.safetensors")


class TestRegistry:
    def test_only_the_built_in(self) -> None:
        registry = ModelRegistry(None, "cpu")
        assert [info.name for info in registry.infos()] == ["retrieval"]
        assert registry.served.everyones["retrieval"].config.top_k == 8

    def test_a_directory(self, tmp_path: Path) -> None:
        save_model(tmp_path / "planner-v1.2.safetensors", CONFIG, make_tensors(CONFIG))
        (tmp_path / "notes.txt").write_text("not a model")
        registry = ModelRegistry(tmp_path, "cpu", RetrievalModel(5.0, 7.0, 3))
        assert [info.name for info in registry.infos()] == ["planner-v1.2", "retrieval"]
        assert registry.served.everyones["planner-v1.2"].dim == 13
        (_, info) = registry.infos()
        assert (info.summary_scale, info.attention_scale, info.top_k) == (5.0, 7.0, 3)
        missing = registry.missing("default", "planner")
        assert isinstance(missing, ModelNotFound) and "'planner'; there are: planner-v1.2, retrieval" in missing.detail

    def test_files_that_cannot_be_served_are_listed(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """One of them ended the start of a server. What macOS leaves beside a copied file is none."""
        whole = model_bytes(CONFIG, make_tensors(CONFIG))
        (tmp_path / "planner.safetensors").write_bytes(whole)
        (tmp_path / "._planner.safetensors").write_bytes(b"\0\5\x16\7 of macOS")
        (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
        (tmp_path / "retrieval.safetensors").write_bytes(whole)
        (tmp_path / "my model.safetensors").write_bytes(whole)
        (tmp_path / "folder.safetensors").mkdir()
        os.mkfifo(tmp_path / "pipe.safetensors")
        (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nothing")
        registry = ModelRegistry(tmp_path)
        told = {info.name: info.error for info in registry.infos()}
        assert told.pop("planner") is None and told.pop("retrieval") is None
        cut = told.pop("cut")
        assert cut is not None and cut.startswith("not a safetensors file: ")
        assert told == {
            "retrieval.safetensors": "the name 'retrieval' belongs to the built-in model",
            "my model.safetensors": "a model's name must match [A-Za-z0-9._~-]{1,128}",
            "folder": "it is not a file",
            "pipe": "it is not a file",
            "gone": "it is not a file",
        }
        assert registry.served.everyones["planner"].dim == 13 and registry.served.everyones["retrieval"].dim is None
        assert registry.missing("default", "cut").detail.startswith(
            "model 'cut' cannot be served: not a safetensors file"
        )
        assert f"the model file {tmp_path / 'cut.safetensors'} is not served: not a safetensors file" in caplog.text
        assert "._planner" not in caplog.text

    def test_a_file_that_the_device_has_no_room_for_is_listed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_model(tmp_path / "planner.safetensors", CONFIG, make_tensors(CONFIG))

        def fail(*args: object) -> None:
            raise RuntimeError("out of memory")

        monkeypatch.setattr("htm_service.attention.registry.load_model", fail)
        (planner, _) = ModelRegistry(tmp_path).infos()
        assert planner.error == "it cannot be loaded: RuntimeError('out of memory')"

    @pytest.mark.parametrize("name", ["", "my model", "a/b", "x" * 129, "x" * 4_000_000])
    def test_what_is_no_name(self, name: str) -> None:
        """A name of 4 MB came back twice in its error; an empty one was the default, or unknown, by the call."""
        missing = ModelRegistry().missing("default", name)
        assert isinstance(missing, InvalidArgument) and not missing.extra
        assert re.match(r"model is '.*', a model's name must match \[", missing.detail)
        assert repr(name[:128])[:-1] in missing.detail and len(missing.detail) < 300

    def test_what_a_name_stands_for(self, tmp_path: Path) -> None:
        """A file's name is everyone's; else a namespace's own model hides the shared one, even one that is not here."""
        save_model(tmp_path / "file.safetensors", CONFIG, make_tensors(CONFIG))
        registry = ModelRegistry(tmp_path)
        own, shared = (ProjectedModel(CONFIG, make_tensors(CONFIG, seed)) for seed in (2, 3))
        before = registry.served
        registry.put(("shared", "m"), shared)
        assert before.find("ours", "m") is None, "what is looked at does not change"
        assert registry.served.find("ours", "m") is registry.served.find("theirs", "m") is shared
        registry.put(("ours", "m"), own)
        assert registry.served.find("ours", "m") is own and registry.served.find("theirs", "m") is shared
        registry.put(("ours", "m"), None)
        assert registry.served.find("ours", "m") is None
        registry.drop(("ours", "m"))
        assert registry.served.find("ours", "m") is shared
        registry.put(("ours", "file"), own)
        assert registry.served.find("ours", "file") is registry.served.everyones["file"]
        assert registry.is_everyones("file") and not registry.is_everyones("m")

    def test_no_directory(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidArgument, match="is not a directory"):
            ModelRegistry(tmp_path / "none")

    @pytest.mark.parametrize("top_k", [0, 257])
    def test_retrieval_limits(self, top_k: int) -> None:
        with pytest.raises(InvalidArgument, match=f"top_k is {top_k}"):
            RetrievalModel(top_k=top_k)
