"""HTMAttention and HTMBlock against htm-pytorch 0.0.4 and against the float64 reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import htm_pytorch
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from htm_service.attention.model_config import ModelConfig
from htm_service.attention.modules import HTMAttention, HTMBlock, select_chunks
from htm_service.attention.positions import position_table
from tests.reference import htm_reference, relative_error

EXACT = 1e-5
"""float32 against an oracle that computes the same means."""
MEAN_EPS = 5e-5
"""float32 against htm-pytorch, whose mean of a partly visible chunk divides by count + 1e-5."""

# The cases are drawn once and for all: a fresh near-tie in top-k would fail without a bug.
quick = settings(max_examples=40, deadline=None, derandomize=True)


@dataclass(frozen=True, slots=True)
class Case:
    seed: int
    batch: int
    num_queries: int
    num_tokens: int
    chunk_size: int
    dim: int
    heads: int
    dim_head: int
    top_k: int
    add_pos_enc: bool
    masked: bool
    chunk_masked: bool

    @property
    def num_chunks(self) -> int:
        return -(-self.num_tokens // self.chunk_size)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Queries [B, Q, D], memories [B, N, D], mask [B, N], chunk mask [B, Q, M]."""
        torch.manual_seed(self.seed)
        queries = torch.randn(self.batch, self.num_queries, self.dim)
        memories = torch.randn(self.batch, self.num_tokens, self.dim)
        mask = torch.rand(self.batch, self.num_tokens) < 0.6 if self.masked else None
        shape = (self.batch, self.num_queries, self.num_chunks)
        chunk_mask = torch.rand(shape) < 0.6 if self.chunk_masked else None
        return queries, memories, mask, chunk_mask

    def modules(self, eps: float = 0.0, block: bool = False) -> tuple[nn.Module, nn.Module]:
        """Ours and htm-pytorch's with the same random weights, biases among them."""
        settings = {
            "heads": self.heads,
            "topk_mems": self.top_k,
            "mem_chunk_size": self.chunk_size,
            "dim_head": self.dim_head,
            "add_pos_enc": self.add_pos_enc,
        }
        theirs: nn.Module = (htm_pytorch.HTMBlock if block else htm_pytorch.HTMAttention)(self.dim, **settings)
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        kind = HTMBlock if block else HTMAttention
        ours = kind(
            self.dim,
            self.heads,
            topk_mems=self.top_k,
            mem_chunk_size=self.chunk_size,
            dim_head=self.dim_head,
            add_pos_enc=self.add_pos_enc,
            eps=eps,
        )
        ours.load_state_dict(theirs.state_dict(), strict=True)
        return ours, theirs

    def config(self, block: bool = False) -> ModelConfig:
        return ModelConfig(
            dim=self.dim,
            heads=self.heads,
            dim_head=self.dim_head,
            top_k=self.top_k,
            chunk_size=self.chunk_size,
            position_encoding=self.add_pos_enc,
            block=block,
        )


@st.composite
def cases(draw: st.DrawFn, oracle: bool = True) -> Case:
    """Cases htm-pytorch can compute when `oracle`: even widths with positions, top_k within the chunks."""
    chunk_size = draw(st.sampled_from([1, 3, 7]))
    num_tokens = draw(st.integers(1 if oracle else 0, 5 * chunk_size))
    num_chunks = -(-num_tokens // chunk_size)
    add_pos_enc = draw(st.booleans())
    return Case(
        seed=draw(st.integers(0, 2**31)),
        batch=draw(st.sampled_from([1, 2])),
        num_queries=draw(st.sampled_from([1, 5])),
        num_tokens=num_tokens,
        chunk_size=chunk_size,
        dim=draw(st.sampled_from([22, 26] if oracle and add_pos_enc else [13, 19])),
        heads=draw(st.sampled_from([1, 3])),
        dim_head=draw(st.sampled_from([5, 11])),
        top_k=draw(st.integers(1, max(1, num_chunks if oracle else num_chunks + 2))),
        add_pos_enc=add_pos_enc,
        masked=draw(st.booleans()),
        chunk_masked=draw(st.booleans()),
    )


def run_oracle(module: nn.Module, case: Case, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None]) -> Tensor:
    """htm-pytorch on memories padded on the right, so that its chunks are anchored at the front."""
    queries, memories, mask, chunk_mask = inputs
    num_missing = -case.num_tokens % case.chunk_size
    if num_missing and mask is None:
        mask = torch.ones(memories.shape[:2], dtype=torch.bool)
    memories = nn.functional.pad(memories, (0, 0, 0, num_missing))
    if mask is not None:
        mask = nn.functional.pad(mask, (0, num_missing), value=False)
    output: Tensor = module(queries, memories, mask=mask, chunk_attn_mask=chunk_mask)
    return output


def sees_something(case: Case, mask: Tensor | None, chunk_mask: Tensor | None) -> Tensor:
    """Which queries see a chunk, [B, Q]; htm-pytorch's answer to the others is garbage."""
    if mask is None:
        mask = torch.ones(case.batch, case.num_tokens, dtype=torch.bool)
    mask = nn.functional.pad(mask, (0, -case.num_tokens % case.chunk_size), value=False)
    visible = mask.reshape(case.batch, 1, case.num_chunks, case.chunk_size).any(-1)
    if chunk_mask is not None:
        visible = visible & chunk_mask
    return visible.any(-1).expand(case.batch, case.num_queries)


class TestAgainstHtmPytorch:
    @quick
    @given(cases(), st.booleans())
    def test_output(self, case: Case, block: bool) -> None:
        inputs = case.inputs()
        queries, memories, mask, chunk_mask = inputs
        ours, theirs = case.modules(block=block)
        with torch.no_grad():
            output = ours(queries, memories, mask=mask, chunk_attn_mask=chunk_mask)
            expected = run_oracle(theirs, case, inputs)
        seen = sees_something(case, mask, chunk_mask)
        partly = case.masked or case.num_tokens % case.chunk_size
        assert relative_error(output[seen], expected[seen]) <= (MEAN_EPS if partly else EXACT)
        unseen = output[~seen]
        nothing = ours.norm(queries)[~seen] if isinstance(ours, HTMBlock) else torch.zeros_like(unseen)
        assert torch.equal(unseen, nothing)

    @quick
    @given(cases(), st.booleans())
    def test_output_with_its_eps(self, case: Case, block: bool) -> None:
        """With eps 1e-5 the means are htm-pytorch's own, so that partly visible chunks agree closely too."""
        if case.num_tokens % case.chunk_size and not case.masked:
            return  # it needs a mask to pad, and then applies eps; ours has no mask and none
        inputs = case.inputs()
        queries, memories, mask, chunk_mask = inputs
        ours, theirs = case.modules(eps=1e-5, block=block)
        with torch.no_grad():
            output = ours(queries, memories, mask, chunk_mask)
            expected = run_oracle(theirs, case, inputs)
        seen = sees_something(case, mask, chunk_mask)
        assert relative_error(output[seen], expected[seen]) <= EXACT

    @quick
    @given(cases(), st.booleans())
    def test_gradients(self, case: Case, block: bool) -> None:
        """Of the queries and of every parameter, in float64."""
        ours, theirs = case.modules(eps=1e-5, block=block)
        queries, memories, mask, chunk_mask = case.inputs()
        if mask is None and case.num_tokens % case.chunk_size:
            mask = torch.ones(memories.shape[:2], dtype=torch.bool)
        upstream = torch.randn(queries.shape, dtype=torch.float64)
        upstream *= sees_something(case, mask, chunk_mask)[..., None]
        gradients = []
        for module in (ours.double(), theirs.double()):
            q = queries.double().requires_grad_()
            m = memories.double().requires_grad_()
            inputs = (q, m, mask, chunk_mask)
            output = (
                module(q, m, mask=mask, chunk_attn_mask=chunk_mask)
                if module is ours
                else run_oracle(module, case, inputs)
            )
            (output * upstream).sum().backward()
            assert m.grad is None
            found = {name: parameter.grad for name, parameter in module.named_parameters()}
            gradients.append(found | {"queries": q.grad})
        assert gradients[0].keys() == gradients[1].keys()
        for name, expected in gradients[1].items():
            actual = gradients[0][name]
            assert actual is not None and expected is not None, name
            assert (actual - expected).norm() <= 1e-5 * expected.norm() + 1e-10, name

    def test_state_dict_round_trip(self) -> None:
        case = Case(0, 1, 1, 9, 3, 22, 3, 5, 2, True, False, False)
        for block in (False, True):
            ours, theirs = case.modules(block=block)
            assert list(ours.state_dict()) == list(theirs.state_dict())
            theirs.load_state_dict(ours.state_dict(), strict=True)
            for name, tensor in theirs.state_dict().items():
                torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=0, atol=0)

    def test_same_random_start(self) -> None:
        """The parameters are made in the same order with the same initialisation."""
        torch.manual_seed(5)
        ours = HTMAttention(22, heads=3, dim_head=5)
        torch.manual_seed(5)
        theirs = htm_pytorch.HTMAttention(22, heads=3, dim_head=5)
        for name, parameter in theirs.named_parameters():
            assert torch.equal(parameter, ours.get_parameter(name)), name


class TestAgainstReference:
    @quick
    @given(cases(oracle=False), st.booleans())
    def test_float32(self, case: Case, block: bool) -> None:
        """Odd widths, more top_k than chunks and no chunks at all included."""
        queries, memories, mask, chunk_mask = case.inputs()
        kind = HTMBlock if block else HTMAttention
        module = kind(
            case.dim,
            case.heads,
            case.top_k,
            case.chunk_size,
            case.dim_head,
            case.add_pos_enc,
        )
        with torch.no_grad():
            output = module(queries, memories, mask, chunk_mask)
        for b in range(case.batch):
            expected = reference_of(module, case, block, queries[b], memories[b], mask, chunk_mask, b)
            assert relative_error(output[b], expected) <= EXACT

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        """All chunks are selected, so that rounding cannot flip the choice between near-equal ones."""
        case = Case(3, 2, 5, 31, 7, 37, 3, 11, 5, True, True, False)
        queries, memories, mask, _ = case.inputs()
        module = HTMAttention(case.dim, case.heads, case.top_k, case.chunk_size, case.dim_head).to(dtype)
        queries, memories = queries.to(dtype), memories.to(dtype)
        with torch.no_grad():
            output = module(queries, memories, mask)
        assert output.dtype == dtype
        for b in range(case.batch):
            expected = reference_of(module, case, False, queries[b], memories[b], mask, None, b)
            assert relative_error(output[b], expected) <= 2e-2

    def test_long_chunk_in_bfloat16(self) -> None:
        """The position table is not computed from rounded frequencies: slot 0 of 499 would be far off."""
        module = HTMAttention(37, 3, 1, 499, 11).to(torch.bfloat16)
        assert module.pos_emb is not None
        assert torch.equal(module.pos_emb.table, position_table(499, 37).to(torch.bfloat16))

    def test_autocast(self) -> None:
        case = Case(4, 2, 5, 31, 7, 37, 3, 11, 5, True, True, False)
        queries, memories, mask, _ = case.inputs()
        module = HTMBlock(case.dim, case.heads, case.top_k, case.chunk_size, case.dim_head)
        with torch.no_grad():
            expected = module(queries, memories, mask)
            with torch.autocast("cpu", torch.bfloat16):
                output = module(queries, memories, mask)
        assert relative_error(output, expected) <= 2e-2


def reference_of(
    module: nn.Module,
    case: Case,
    block: bool,
    queries: Tensor,
    memories: Tensor,
    mask: Tensor | None,
    chunk_mask: Tensor | None,
    b: int,
) -> np.ndarray:
    """The reference's output [Q, D] of item b of a batch, with the module's weights."""
    weights = {name.removeprefix("attn.") if block else name: t for name, t in module.state_dict().items()}
    return htm_reference(
        queries,
        memories,
        case.config(block),
        weights,
        visible=None if mask is None else mask[b].numpy(),
        chunk_mask=None if chunk_mask is None else chunk_mask[b].numpy(),
    ).output


class TestEdges:
    @pytest.mark.parametrize("num_tokens", [0, 2])
    def test_nothing_visible(self, num_tokens: int) -> None:
        """No chunks, or all masked: zero, or the normed query, and gradients that are finite."""
        queries = torch.randn(2, 3, 13, requires_grad=True)
        memories = torch.randn(2, num_tokens, 13)
        mask = torch.zeros(2, num_tokens, dtype=torch.bool)
        attention, block = HTMAttention(13, 3, 2, 5, 7), HTMBlock(13, 3, topk_mems=2, dim_head=7)
        output = attention(queries, memories, mask=mask)
        assert torch.equal(output, torch.zeros_like(output))
        assert torch.equal(block(queries, memories, mask=mask), block.norm(queries))
        output.sum().backward()
        assert queries.grad is not None and torch.isfinite(queries.grad).all()

    def test_hidden_garbage_stays_hidden(self) -> None:
        queries, memories = torch.randn(1, 3, 13), torch.randn(1, 11, 13)
        mask = torch.rand(1, 11) < 0.5
        dirty = memories.masked_fill(~mask[..., None], torch.nan)
        attention = HTMAttention(13, 3, 2, 5, 7)
        assert torch.equal(attention(queries, dirty, mask), attention(queries, memories, mask))

    def test_inputs_are_unchanged(self) -> None:
        case = Case(7, 2, 5, 19, 3, 13, 3, 5, 2, True, True, True)
        inputs = case.inputs()
        clones = [None if tensor is None else tensor.clone() for tensor in inputs]
        HTMBlock(13, 3, topk_mems=2, mem_chunk_size=3, dim_head=5)(*inputs)
        for tensor, clone in zip(inputs, clones, strict=True):
            assert tensor is None or (clone is not None and torch.equal(tensor, clone))

    @pytest.mark.parametrize("masked", [False, True])
    def test_the_summary_of_large_tokens_is_finite(self, masked: bool) -> None:
        """The sum of two tokens of 3.4e38 is infinity, and its logit with a query of zeros was NaN."""
        attention = HTMAttention(2, heads=1, dim_head=2, mem_chunk_size=2, add_pos_enc=False)
        with torch.no_grad():
            for linear in (attention.to_summary_queries, attention.to_summary_keys, attention.attn.to_kv):
                for parameter in linear.parameters():
                    parameter.zero_()
            attention.to_summary_keys.weight.copy_(torch.eye(2))
            mask = torch.ones(1, 3, dtype=torch.bool) if masked else None
            output = attention(torch.zeros(1, 1, 2), torch.full((1, 3, 2), 3.4e38), mask=mask)
        torch.testing.assert_close(output[0, 0], attention.attn.to_out.bias.detach())

    def test_appending_never_moves_a_chunk(self) -> None:
        """What was computed over the first chunks stays when tokens come after them and are masked out."""
        queries, memories = torch.randn(1, 3, 13), torch.randn(1, 17, 13)
        attention = HTMAttention(13, 3, 2, 5, 7)
        mask = torch.arange(17)[None] < 10
        torch.testing.assert_close(attention(queries, memories[:, :10]), attention(queries, memories, mask))

    def test_ties_go_to_the_lower_index(self) -> None:
        logits = torch.tensor([[[1.0, 3.0, 3.0, 3.0, 2.0]]])
        selectable = torch.tensor([[[True, False, True, True, True]]])
        index, weights = select_chunks(logits, selectable, 3)
        assert index.tolist() == [[[2, 3, 4]]]
        torch.testing.assert_close(weights[0, 0], torch.tensor([3.0, 3.0, 2.0]).softmax(0))

    def test_many_ties(self) -> None:
        """Wide enough that an unstable selection, such as topk's, mixes equals up."""
        logits = torch.arange(499).remainder(3).float()[None, None]
        index, _ = select_chunks(logits, torch.tensor(True), 197)
        assert index[0, 0].tolist() == [*range(2, 499, 3), *range(1, 499, 3)][:197]

    def test_fewer_selectable_than_k(self) -> None:
        index, weights = select_chunks(torch.tensor([[[5.0, 1.0, 9.0]]]), torch.tensor([[[False, True, False]]]), 7)
        assert index.shape == (1, 1, 3)
        assert index[0, 0, 0] == 1
        assert weights.tolist() == [[[1.0, 0.0, 0.0]]]

    def test_defaults(self) -> None:
        """htm-pytorch's README makes an HTMBlock without heads; here that works."""
        block = HTMBlock(dim=26, topk_mems=2, mem_chunk_size=3)
        assert block(torch.randn(1, 5, 26), torch.randn(1, 9, 26)).shape == (1, 5, 26)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_cuda(self) -> None:
        case = Case(8, 2, 5, 31, 7, 37, 3, 11, 5, True, True, True)
        inputs = case.inputs()
        module = HTMBlock(case.dim, case.heads, case.top_k, case.chunk_size, case.dim_head)
        with torch.no_grad():
            expected = module(*inputs)
            output = module.cuda()(*(None if tensor is None else tensor.cuda() for tensor in inputs))
        assert relative_error(output, expected) <= EXACT


class TestRejections:
    @pytest.mark.parametrize(
        ("queries", "memories", "masks", "message"),
        [
            (torch.zeros(1, 2, 7), torch.zeros(1, 3, 13), {}, r"queries has shape \[1, 2, 7\].*13"),
            (torch.zeros(2, 13), torch.zeros(1, 3, 13), {}, r"queries has shape \[2, 13\]"),
            (torch.zeros(1, 2, 13), torch.zeros(1, 3, 7), {}, r"memories has shape \[1, 3, 7\].*13"),
            (torch.zeros(1, 2, 13), torch.zeros(5, 3, 13), {}, "memories has batch 5, queries 1"),
            (torch.zeros(1, 2, 13).long(), torch.zeros(1, 3, 13), {}, "queries has dtype torch.int64"),
            (torch.zeros(1, 2, 13), torch.zeros(1, 3, 13).half(), {}, "memories has dtype torch.float16"),
            (
                torch.zeros(1, 2, 13),
                torch.zeros(1, 3, 13),
                {"mask": torch.ones(1, 5, dtype=torch.bool)},
                r"mask has shape \[1, 5\]; it must be \[1, 3\]",
            ),
            (
                torch.zeros(1, 2, 13),
                torch.zeros(1, 3, 13),
                {"mask": torch.ones(1, 3)},
                "mask has dtype torch.float32",
            ),
            (
                torch.zeros(1, 2, 13),
                torch.zeros(1, 3, 13),
                {"chunk_attn_mask": torch.ones(1, 2, 3, dtype=torch.bool)},
                r"chunk_attn_mask has shape \[1, 2, 3\]; it must be \[1, 2, 1\]",
            ),
        ],
    )
    def test_call(self, queries: Tensor, memories: Tensor, masks: dict[str, Tensor], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            HTMAttention(13, 3, 2, 5, 7)(queries, memories, **masks)

    @pytest.mark.parametrize("name", ["dim", "heads", "topk_mems", "mem_chunk_size", "dim_head"])
    def test_constructor(self, name: str) -> None:
        arguments: dict[str, Any] = {"dim": 13, "heads": 3} | {name: 0}
        with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
            HTMAttention(**arguments)

    def test_eps(self) -> None:
        with pytest.raises(ValueError, match=r"eps is -1\.0"):
            HTMAttention(13, eps=-1.0)
