"""The compiled kernel's loops: numba makes machine code of them, which runs without the interpreter's lock.

Written for one core's vector units and caches: each number that comes from memory is used for several products
before the next one is fetched. Measured against BLAS in docs/decisions.md.
Shapes: S searches, R rows, Q rows of one search, D width, H heads, C chunk size, K chunks X
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba.extending import intrinsic

Array = npt.NDArray[Any]

KEYS_AT_ONCE = 64
"""Keys scored for all rows of their search before the next ones: a block stays in cache between the rows."""
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
"""How contents are encoded."""
SEARCH = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("keys", "pages", "token_mask", "hidden", "hides_by_row"),
            *("num_keys", "first", "start", "stop", "num_queries", "k"),
        )
    ]
)
"""A `kernels.base.Search`, its tensors as addresses, 0 for none."""
TWO_112 = 2.0**112
"""What a float16's exponent and fraction, moved to where float32 has them, are too small by."""


def compile_loop(function: Callable[..., Any]) -> Callable[..., Any]:
    """`numba.njit` with the first call compiling, from the cache on disk where one can be written."""
    # Sums may be reordered, or they could not be vectorised; NaN and infinity must stay what they are.
    options: dict[str, Any] = {
        "nogil": True,
        "fastmath": {"contract", "reassoc", "nsz", "arcp"},
        "error_model": "numpy",
    }
    try:
        compiled: Callable[..., Any] = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder that numba could write its cache to, as in a read-only container
        compiled = numba.njit(**options)(function)
    return compiled


@intrinsic
def _pointer(typing_context: Any, address: Any, like: Any) -> Any:
    """An address (int64) as a pointer to what the array `like` holds."""
    signature = numba.types.CPointer(like.dtype)(address, like)  # type: ignore[no-untyped-call]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return signature, generate


@compile_loop
def _array_at(address: int, like: Array, shape: Any) -> Array:
    """The array of this shape and the type of `like` that begins at an address; nothing of it is read here."""
    return numba.carray(_pointer(address, like), shape)  # type: ignore[attr-defined, call-arg]


@compile_loop
def fold(
    queries: Array,  # [R, D]
    summary_weight: Array,  # [D, D]
    summary_bias: Array,  # [D]
    query_weight: Array,  # [H E, D]
    query_bias: Array,  # [H E]
    key_weight: Array,  # [H, E, D]
    summary: Array,  # [R, D]; written
    heads: Array,  # [R, H, D]; written
) -> None:
    """Queries to what meets summary keys, and per head to what meets tokens."""
    num_heads, dim_head = key_weight.shape[:2]
    head_queries = np.empty((len(queries), len(query_weight)), np.float32)
    _linear(queries, summary_weight, summary_bias, summary)
    _linear(queries, query_weight, query_bias, head_queries)
    # Whole arrays of their own per head: in a slice of an array the compiler cannot tell that numbers lie together.
    of_head = np.empty((len(queries), dim_head), np.float32)
    for h in range(num_heads):
        of_head[:] = head_queries[:, h * dim_head : (h + 1) * dim_head]
        folded = np.zeros(queries.shape, np.float32)
        _add_weighted(of_head, key_weight[h], folded)
        heads[:, h] = folded


@compile_loop
def project(
    z: Array,  # [R, H, D]
    value_weight: Array,  # [H, E, D]
    output_weight: Array,  # [D, H E]
    output_bias: Array,  # [D]
    output: Array,  # [R, D]; written
) -> None:
    """Sums of tokens to values per head, and these to answers."""
    num_heads, dim_head = value_weight.shape[:2]
    values = np.empty((len(z), num_heads * dim_head), np.float32)
    of_head, summed = np.empty((dim_head, len(z)), np.float32), np.empty((len(z), z.shape[2]), np.float32)
    for h in range(num_heads):
        summed[:] = z[:, h]
        _dots(value_weight[h], summed, of_head)
        values[:, h * dim_head : (h + 1) * dim_head] = of_head.T
    _linear(values, output_weight, output_bias, output)


@compile_loop
def attend(
    wide: Array,  # [P, C, D] float32 contents, or empty
    narrow: Array,  # [P, C, D] uint16: the bits of bfloat16 or float16 contents, or empty
    encoding: int,  # FLOAT32, BFLOAT16 or FLOAT16
    searches: Array,  # [S] SEARCH
    summary: Array,  # [R, D]
    heads: Array,  # [R, H, D]
    positions: Array,  # [C, D], or [0, D]
    chunk_index: Array,  # [R, K] int64, -1; written
    chunk_weight: Array,  # [R, K], 0; written
    z: Array,  # [R, H, D], 0; written
    token_weight: Array,  # [R, K, C] or empty, 0; written
    token_score: Array,  # [R, K, C] or empty, -inf; written
) -> None:
    """The whole read path of a batch: each search's keys, then the chunks that its rows took."""
    num_heads, dim, size = heads.shape[1], heads.shape[2], max(wide.shape[1], narrow.shape[1])
    no_flags = np.empty(0, np.bool_)
    workspace = np.empty((size, dim), np.float32)
    slots = np.empty(size, np.int64)
    share = np.empty((num_heads, size), np.float32)
    by_slot = np.empty((num_heads, size), np.float32)
    position_logits = np.zeros((num_heads, size), np.float32)
    row = 0
    for s in range(len(searches)):
        search = searches[s]
        rows = slice(row, row + search.num_queries)
        _select(search, summary[rows], chunk_index[rows], chunk_weight[rows])
        page_table = _array_at(search.pages, chunk_index, (search.num_keys,))
        marked = _array_at(search.token_mask, no_flags, (search.stop,))
        for row in range(rows.start, rows.stop):
            by_slot[:] = 0
            if len(positions):
                _dots(heads[row], positions, position_logits)
            for place in range(search.k):
                chunk = chunk_index[row, place]
                if chunk < 0:
                    continue
                begin = (search.first + chunk) * size
                seen = 0
                for slot in range(max(0, search.start - begin), min(size, search.stop - begin)):
                    if search.token_mask == 0 or marked[begin + slot]:
                        slots[seen] = slot
                        seen += 1
                chunk_index[row, place] = search.first + chunk
                if seen == 0:
                    continue
                tokens = _tokens(wide, narrow, encoding, page_table[chunk], slots[:seen], workspace)
                _dots(heads[row], tokens, share)
                for h in range(num_heads):
                    logits = share[h, :seen]
                    for i in range(seen):
                        logits[i] += position_logits[h, slots[i]]
                    if len(token_score):
                        for i in range(seen):
                            score = logits[i] / np.float32(num_heads)
                            at = slots[i]
                            token_score[row, place, at] = score + (token_score[row, place, at] if h else 0)
                    _softmax(logits)
                    if len(token_weight):
                        for i in range(seen):
                            token_weight[row, place, slots[i]] += logits[i] / np.float32(num_heads)
                    for i in range(seen):
                        logits[i] *= chunk_weight[row, place]
                        by_slot[h, slots[i]] += logits[i]
                _add_weighted(share, tokens, z[row])
            if len(positions):
                _add_weighted(by_slot, positions, z[row])
        row = rows.stop


@compile_loop
def _select(search: Any, summary: Array, index: Array, weight: Array) -> None:
    """The k chunks of each row [Q, D] with the greatest logits, and the softmax of these, in one pass over the keys."""
    num_rows, k, num_keys = len(summary), search.k, search.num_keys
    keys = _array_at(search.keys, summary, (num_keys, summary.shape[1]))
    hidden = _array_at(search.hidden, np.empty(0, np.bool_), (num_rows, num_keys))
    scores = np.empty((KEYS_AT_ONCE, num_rows), np.float32)
    best = np.full((num_rows, max(k, 1)), -np.inf, np.float32)
    overflowed = np.zeros(num_rows, np.bool_)
    for start in range(0, num_keys, KEYS_AT_ONCE):
        block = keys[start : min(start + KEYS_AT_ONCE, num_keys)]
        _dots(block, summary, scores)
        for q in range(num_rows):
            for i in range(len(block)):
                if search.hidden != 0 and hidden[q if search.hides_by_row else 0, start + i]:
                    continue
                score = scores[i, q]
                if not np.isfinite(score):
                    overflowed[q] = True
                elif score > best[q, k - 1]:
                    place = k - 1
                    while place > 0 and best[q, place - 1] < score:
                        best[q, place] = best[q, place - 1]
                        index[q, place] = index[q, place - 1]
                        place -= 1
                    best[q, place] = score
                    index[q, place] = start + i
    for q in range(num_rows):
        taken = 0
        while taken < k and index[q, taken] >= 0:
            taken += 1
        _softmax(best[q, :taken])
        weight[q, :taken] = best[q, :taken]
        if overflowed[q]:
            weight[q] = np.nan


@compile_loop
def _softmax(logits: Array) -> None:
    """In place, over a whole row [n]."""
    greatest = np.float32(-np.inf)
    for i in range(len(logits)):
        if not logits[i] <= greatest:  # a NaN becomes the greatest, and stays
            greatest = logits[i]
    total = np.float32(0)
    for i in range(len(logits)):
        logits[i] = np.exp(logits[i] - greatest)
        total += logits[i]
    for i in range(len(logits)):
        logits[i] /= total


@compile_loop
def _tokens(wide: Array, narrow: Array, encoding: int, page: int, slots: Array, workspace: Array) -> Array:
    """The tokens [n, D] in the n `slots` of a page; in place where they are float32 and the page's first n."""
    if encoding == FLOAT32:
        if slots[-1] == len(slots) - 1:
            return wide[page, : len(slots)]
        for i in range(len(slots)):
            workspace[i] = wide[page, slots[i]]
        return workspace[: len(slots)]
    for i in range(len(slots)):
        bits, token, token_bits = narrow[page, slots[i]], workspace[i], workspace[i].view(np.uint32)
        if encoding == BFLOAT16:
            for d in range(len(bits)):
                token_bits[d] = np.uint32(bits[d]) << np.uint32(16)
        else:
            for d in range(len(bits)):
                token_bits[d] = np.uint32(bits[d] & 0x7FFF) << np.uint32(13)
            for d in range(len(bits)):
                token[d] *= np.float32(TWO_112)
            for d in range(len(bits)):
                token_bits[d] |= np.uint32(bits[d] & 0x8000) << np.uint32(16)
    return workspace[: len(slots)]


@compile_loop
def _linear(x: Array, weight: Array, bias: Array, out: Array) -> None:
    """`x` [R, D] times the transposed `weight` [N, D], plus `bias` [N], into out [R, N]; the weight is read once."""
    columns = np.empty((len(weight), len(x)), np.float32)
    _dots(weight, x, columns)
    for row in range(len(x)):
        for n in range(len(weight)):
            out[row, n] = columns[n, row] + bias[n]


@compile_loop
def _dots(a: Array, b: Array, out: Array) -> None:
    """All dot products of a [n, D] with b [m, D] into out[:n, :m]; four by four, so that a load serves four."""
    dim = a.shape[1]
    whole_a, whole_b = len(a) // 4 * 4, len(b) // 4 * 4
    zero = np.float32(0)
    for i in range(0, whole_a, 4):
        a0, a1, a2, a3 = a[i], a[i + 1], a[i + 2], a[i + 3]
        for j in range(0, whole_b, 4):
            b0, b1, b2, b3 = b[j], b[j + 1], b[j + 2], b[j + 3]
            s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = zero
            s20 = s21 = s22 = s23 = s30 = s31 = s32 = s33 = zero
            for d in range(dim):
                s00 += a0[d] * b0[d]
                s01 += a0[d] * b1[d]
                s02 += a0[d] * b2[d]
                s03 += a0[d] * b3[d]
                s10 += a1[d] * b0[d]
                s11 += a1[d] * b1[d]
                s12 += a1[d] * b2[d]
                s13 += a1[d] * b3[d]
                s20 += a2[d] * b0[d]
                s21 += a2[d] * b1[d]
                s22 += a2[d] * b2[d]
                s23 += a2[d] * b3[d]
                s30 += a3[d] * b0[d]
                s31 += a3[d] * b1[d]
                s32 += a3[d] * b2[d]
                s33 += a3[d] * b3[d]
            out[i, j], out[i, j + 1], out[i, j + 2], out[i, j + 3] = s00, s01, s02, s03
            out[i + 1, j], out[i + 1, j + 1], out[i + 1, j + 2], out[i + 1, j + 3] = s10, s11, s12, s13
            out[i + 2, j], out[i + 2, j + 1], out[i + 2, j + 2], out[i + 2, j + 3] = s20, s21, s22, s23
            out[i + 3, j], out[i + 3, j + 1], out[i + 3, j + 2], out[i + 3, j + 3] = s30, s31, s32, s33
    for i in range(len(a)):
        for j in range(whole_b if i < whole_a else 0, len(b)):
            total = zero
            for d in range(dim):
                total += a[i, d] * b[j, d]
            out[i, j] = total


@compile_loop
def _add_weighted(shares: Array, tokens: Array, z: Array) -> None:
    """Add to z [H, D] the sums of tokens [n, D] weighted by shares [H, :n]; eight tokens at once."""
    whole = len(tokens) // 8 * 8
    for i in range(0, whole, 8):
        x0, x1, x2, x3 = tokens[i], tokens[i + 1], tokens[i + 2], tokens[i + 3]
        x4, x5, x6, x7 = tokens[i + 4], tokens[i + 5], tokens[i + 6], tokens[i + 7]
        for h in range(len(z)):
            p0, p1, p2, p3 = shares[h, i], shares[h, i + 1], shares[h, i + 2], shares[h, i + 3]
            p4, p5, p6, p7 = shares[h, i + 4], shares[h, i + 5], shares[h, i + 6], shares[h, i + 7]
            to = z[h]
            for d in range(len(to)):
                to[d] += (
                    p0 * x0[d] + p1 * x1[d] + p2 * x2[d] + p3 * x3[d]
                    + p4 * x4[d] + p5 * x5[d] + p6 * x6[d] + p7 * x7[d]
                )  # fmt: skip
    for i in range(whole, len(tokens)):
        for h in range(len(z)):
            for d in range(z.shape[1]):
                z[h, d] += shares[h, i] * tokens[i, d]
