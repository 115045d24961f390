"""The compiled kernel's loops: numba makes machine code of them, which runs without the interpreter's lock.

Written for one core's vector units and caches: each number that comes from memory is used for several products
before the next one is fetched. Measured against BLAS in docs/decisions.md.
Shapes: S searches, R rows, Q rows of one search, D width, H heads, C chunk size, K chunks per row
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
            *("keys", "pages", "token_mask", "hidden", "hidden_stride"),
            *("num_keys", "first", "start", "stop", "num_queries", "k", "ends", "own_keys"),
        )
    ]
)
"""`kernels.base.Search.numbers`."""
WIDE_VECTORS = '"prefer-vector-width"="512"'
"""LLVM's attribute of a function."""
LINE = 16
"""float32 numbers in a line of the cache, and in the widest vectors."""
MOST = 2.0**128 - 2.0**104
"""The largest float32."""
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


@intrinsic
def prefer_wide_vectors(typing_context: Any) -> Any:
    """Let the function that calls this have vectors of 512 bits where the CPU has them, a no-op elsewhere.

    LLVM takes 256 bits on Intel's CPUs with AVX-512, because short stretches of wider ones once slowed their clock for
    all else; these loops are long. It is asked for by function, not by the target's features (`numba.config`), which
    are all numba code's and fixed as the first module that has any is imported. A user's choice of features stands.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if numba.config.CPU_FEATURES is None:  # type: ignore[attr-defined]
            set.add(builder.function.attributes, WIDE_VECTORS)  # their own `add` knows enumerated ones only
        return context.get_dummy_value()

    return numba.types.void(), generate


@compile_loop
def array_at(address: int, like: Array, shape: Any) -> Array:
    """The array of this shape and the type of `like` that begins at an address; nothing of it is read here."""
    return numba.carray(_pointer(address, like), shape)  # type: ignore[attr-defined, call-arg]


@compile_loop
def aligned(num_rows: int, dim: int) -> Array:
    """An array [num_rows, dim], not set, that begins where a line of the cache does.

    numpy's begin anywhere, and every load of a whole line is then two: the loops take up to 1.7 times as long.
    """
    buffer = np.empty(num_rows * dim + LINE, np.float32)
    first = -(np.int64(buffer.ctypes.data) // 4) % LINE
    return buffer[first : first + num_rows * dim].reshape((num_rows, dim))


@compile_loop
def answer(
    queries: Array,  # [R, D]
    summary_weight: Array,  # a `kernels.base.Projections`, from here
    summary_bias: Array,
    query_weight: Array,
    query_bias: Array,
    key_weight: Array,
    value_weight: Array,
    output_weight: Array,
    output_bias: Array,  # to here
    wide: Array,  # as in `attend`, from here
    narrow: Array,
    encoding: int,
    searches: Array,
    positions: Array,
    chunk_index: Array,
    chunk_weight: Array,
    z: Array,
    token_weight: Array,
    token_score: Array,  # to here
    output: Array,  # [R, D], 0; written
) -> None:
    """All of it for some rows: fold, score, attend, project. A row that took no chunk is left as it is."""
    summary, heads = np.empty(queries.shape, np.float32), np.empty(z.shape, np.float32)
    fold(queries, summary_weight, summary_bias, query_weight, query_bias, key_weight, summary, heads)
    written = (chunk_index, chunk_weight, z, token_weight, token_score)
    read(wide, narrow, encoding, searches, summary, heads, positions, *written)
    projected = np.empty(queries.shape, np.float32)
    project(z, value_weight, output_weight, output_bias, projected)
    for row in range(len(output)):
        if np.any(chunk_index[row] >= 0):
            output[row] = projected[row]


@compile_loop
def read(
    wide: Array,  # as in `attend`, but for `summary`
    narrow: Array,
    encoding: int,
    searches: Array,
    summary: Array,  # [R, D]
    heads: Array,
    positions: Array,
    chunk_index: Array,
    chunk_weight: Array,
    z: Array,
    token_weight: Array,
    token_score: Array,
) -> None:
    """Score all keys, then attend."""
    index = np.full((len(heads), 1, chunk_index.shape[1]), -1, np.int64)
    logit = np.full(index.shape, -np.inf, np.float32)
    score(searches, summary, 0, index, logit)
    written = (chunk_index, chunk_weight, z, token_weight, token_score)
    attend(wide, narrow, encoding, searches, index, logit, heads, positions, *written)


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
    of_head, folded = np.empty((len(queries), dim_head), np.float32), aligned(*queries.shape)
    for h in range(num_heads):
        of_head[:] = head_queries[:, h * dim_head : (h + 1) * dim_head]
        folded[:] = 0
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
    of_head, summed = np.empty((dim_head, len(z)), np.float32), aligned(len(z), z.shape[2])
    for h in range(num_heads):
        summed[:] = z[:, h]
        dots(value_weight[h], summed, of_head)
        values[:, h * dim_head : (h + 1) * dim_head] = of_head.T
    _linear(values, output_weight, output_bias, output)


@compile_loop
def attend(
    wide: Array,  # [P, C, D] float32 contents, or empty
    narrow: Array,  # [P, C, D] uint16: the bits of bfloat16 or float16 contents, or empty
    encoding: int,  # FLOAT32, BFLOAT16 or FLOAT16
    searches: Array,  # [S] SEARCH
    index: Array,  # [R, P, K] int64, and `logit` [R, P, K]: what `score` found; overwritten
    logit: Array,
    heads: Array,  # [R, H, D]
    positions: Array,  # [C, D], or [0, D]
    chunk_index: Array,  # [R, K] int64, -1; written
    chunk_weight: Array,  # [R, K], 0; written
    z: Array,  # [R, H, D], 0; written
    token_weight: Array,  # [R, K, C] or empty, 0; written
    token_score: Array,  # [R, K, C] or empty, -inf; written
) -> None:
    """The chunks that each row takes, attended in and summed up."""
    choose(searches, index, logit, chunk_index, chunk_weight)
    num_heads, dim, size = heads.shape[1], heads.shape[2], max(wide.shape[1], narrow.shape[1])
    no_flags = np.empty(0, np.bool_)
    workspace, head_queries, sums = aligned(size, dim), aligned(num_heads, dim), aligned(num_heads, dim)
    share = np.empty((num_heads, size), np.float32)
    by_slot = np.empty((num_heads, size), np.float32)
    position_logits = np.zeros((num_heads, size), np.float32)
    row = 0
    for s in range(len(searches)):
        search = searches[s]
        rows = slice(row, row + search.num_queries)
        page_table = array_at(search.pages, chunk_index, (search.num_keys,))
        marked = array_at(search.token_mask, no_flags, (search.stop,))
        ends = array_at(search.ends, chunk_index, (search.num_queries, 3))
        for row in range(rows.start, rows.stop):
            head_queries[:], sums[:], by_slot[:] = heads[row], 0, 0
            stop = ends[row - rows.start, 2] if search.ends != 0 else search.stop
            if len(positions):
                dots(head_queries, positions, position_logits)
            for place in range(search.k):
                chunk = chunk_index[row, place]
                if chunk < 0:
                    continue
                begin, end = max(0, search.start - chunk * size), min(size, stop - chunk * size)
                seen = marked[chunk * size + begin : chunk * size + end]
                if begin >= end or (search.token_mask != 0 and not seen.any()):
                    continue
                tokens = page_tokens(wide, narrow, encoding, page_table[chunk - search.first], begin, end, workspace)
                dots(head_queries, tokens, share)
                for h in range(num_heads):
                    logits, spread = share[h, : end - begin], by_slot[h, begin:end]
                    logits += position_logits[h, begin:end]
                    _mark_overflow(logits)
                    if search.token_mask != 0:
                        _hide(logits, seen)
                    if len(token_score):
                        if h == 0:
                            token_score[row, place, begin:end] = 0
                        _add_mean(logits, num_heads, token_score[row, place, begin:end])
                    _softmax(logits)
                    if len(token_weight):
                        _add_mean(logits, num_heads, token_weight[row, place, begin:end])
                    logits *= chunk_weight[row, place]
                    spread += logits
                _add_weighted(share, tokens, sums)
            if len(positions):
                _add_weighted(by_slot, positions, sums)
            _put_back(sums)
            z[row] = sums
        row = rows.stop


@compile_loop
def _mark_overflow(logits: Array) -> None:
    """NaN for those [n] that are not finite: the softmax of one that is -inf would not tell."""
    for i in range(len(logits)):
        if not np.abs(logits[i]) <= np.float32(MOST):
            logits[i] = np.nan


@compile_loop
def _put_back(sums: Array) -> None:
    """Means of tokens [H, D] that rounding put beyond all finite numbers."""
    most = np.float32(MOST)
    for h in range(len(sums)):
        for d in range(sums.shape[1]):
            if sums[h, d] > most:
                sums[h, d] = most
            elif sums[h, d] < -most:
                sums[h, d] = -most


@compile_loop
def _hide(logits: Array, seen: Array) -> None:
    """-inf for the tokens [n] that are not visible."""
    for i in range(len(logits)):
        if not seen[i]:
            logits[i] = -np.inf


@compile_loop
def _add_mean(numbers: Array, num_heads: int, mean: Array) -> None:
    """One head's part of a mean over heads [n]."""
    for i in range(len(numbers)):
        mean[i] += numbers[i] / np.float32(num_heads)


@compile_loop
def score(searches: Array, summary: Array, part: int, index: Array, logit: Array) -> None:
    """Each row's [R, D] best keys in one of P equal parts of its search's keys, in one pass over them.

    Into index and logit [R, P, K], at `part`, which hold -1 and -inf; a row with an overflow gets NaN in front.
    """
    num_parts, row = index.shape[1], 0
    for s in range(len(searches)):
        search = searches[s]
        rows = slice(row, row + search.num_queries)
        begin, end = search.num_keys * part // num_parts, search.num_keys * (part + 1) // num_parts
        _score(search, begin, end, summary[rows], index[rows, part], logit[rows, part])
        row = rows.stop


@compile_loop
def _score(search: Any, begin: int, end: int, summary: Array, index: Array, logit: Array) -> None:
    """The best of the keys begin .. end-1 of one search."""
    num_rows, num_keys = len(summary), search.num_keys
    keys = array_at(search.keys, summary, (num_keys, summary.shape[1]))
    hidden = array_at(search.hidden, np.empty(0, np.bool_), (num_rows, num_keys))
    ends = array_at(search.ends, index, (num_rows, 3))
    rows, scores = aligned(*summary.shape), np.empty((KEYS_AT_ONCE, num_rows), np.float32)
    rows[:] = summary
    overflowed = np.zeros(num_rows, np.bool_)
    for start in range(begin, end, KEYS_AT_ONCE):
        block = keys[start : min(start + KEYS_AT_ONCE, end)]
        dots(block, rows, scores)
        for q in range(num_rows):
            for i in range(len(block) if search.ends == 0 else min(len(block), ends[q, 0] - start)):
                if search.hidden != 0 and hidden[q if search.hidden_stride else 0, start + i]:
                    continue
                if not np.isfinite(scores[i, q]):
                    overflowed[q] = True
                elif scores[i, q] > logit[q, search.k - 1]:
                    _put(scores[i, q], start + i, logit[q, : search.k], index[q])
    if search.ends != 0:
        _score_own(search, begin, end, rows, logit, index, overflowed)
    for q in range(num_rows):
        if overflowed[q]:
            logit[q, 0] = np.nan


@compile_loop
def _score_own(search: Any, begin: int, end: int, rows: Array, logit: Array, index: Array, overflowed: Array) -> None:
    """The keys begin .. end-1 that one row alone sees so, its last: they come after the others of its chunks."""
    num_rows, score = len(rows), np.empty((1, 1), np.float32)
    ends = array_at(search.ends, index, (num_rows, 3))
    own_keys = array_at(search.own_keys, rows, (num_rows, rows.shape[1]))
    hidden = array_at(search.hidden, np.empty(0, np.bool_), (num_rows, search.num_keys))
    for q in range(num_rows):
        own = ends[q, 1]
        if own < begin or own >= end or (search.hidden != 0 and hidden[q if search.hidden_stride else 0, own]):
            continue
        dots(own_keys[q : q + 1], rows[q : q + 1], score)
        if not np.isfinite(score[0, 0]):
            overflowed[q] = True
        elif score[0, 0] > logit[q, search.k - 1]:
            _put(score[0, 0], own, logit[q, : search.k], index[q])


@compile_loop
def _put(score: float, key: int, best: Array, index: Array) -> None:
    """Put a key whose score beats the last of the best [k] where it belongs, after those of the same score."""
    place = len(best) - 1
    while place > 0 and best[place - 1] < score:
        best[place] = best[place - 1]
        index[place] = index[place - 1]
        place -= 1
    best[place] = score
    index[place] = key


@compile_loop
def choose(searches: Array, index: Array, logit: Array, chunk_index: Array, chunk_weight: Array) -> None:
    """The chunks [R, K] taken of the best of all parts [R, P, K], and the softmax of their logits.

    A row with an overflow takes none and has NaN as its weights.
    """
    row = 0
    for s in range(len(searches)):
        k = searches[s].k
        for _ in range(searches[s].num_queries):
            best = logit[row, 0, :k]
            chunk_index[row] = index[row, 0]
            overflowed = False
            for part in range(logit.shape[1]):
                overflowed |= k > 0 and np.isnan(logit[row, part, 0])
                for place in range(k if part else 0):
                    if logit[row, part, place] > best[k - 1]:
                        _put(logit[row, part, place], index[row, part, place], best, chunk_index[row])
            taken = 0
            while taken < k and chunk_index[row, taken] >= 0:
                chunk_index[row, taken] += searches[s].first
                taken += 1
            _softmax(best[:taken])
            chunk_weight[row, :taken] = best[:taken]
            if overflowed:
                chunk_index[row] = -1
                chunk_weight[row] = np.nan
            row += 1


@compile_loop
def _softmax(logits: Array) -> None:
    """In place, over a whole row [n]."""
    greatest = np.float32(-np.inf)
    for i in range(len(logits)):
        if not logits[i] <= greatest:  # a NaN becomes the greatest, and stays
            greatest = logits[i]
    for i in range(len(logits)):
        logits[i] = _exp(logits[i] - greatest)
    total = np.float32(0)
    for i in range(len(logits)):
        total += logits[i]
    for i in range(len(logits)):
        logits[i] /= total


@compile_loop
def _exp(x: np.float32) -> np.float32:
    """e to the power of x <= 0, to some units in the last place, 0 below -87, NaN of NaN.

    Of plain arithmetic, so that a loop of it is vectorised, which one of `np.exp` is not. The polynomial is Cephes'.
    """
    least, half = np.float32(-87), np.float32(0.5)
    whole = np.floor((x if x > least else least) * np.float32(1.44269504) + half)
    rest = np.float32(x - whole * np.float32(0.693147181))
    value = np.float32(1.9875691500e-4)
    value = value * rest + np.float32(1.3981999507e-3)
    value = value * rest + np.float32(8.3334519073e-3)
    value = value * rest + np.float32(4.1665795894e-2)
    value = value * rest + np.float32(1.6666665459e-1)
    value = value * rest + half
    value = value * rest * rest + rest + np.float32(1)
    power = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
    return np.float32(0) if x < least else np.float32(value * power)


@compile_loop
def page_tokens(wide: Array, narrow: Array, encoding: int, page: int, begin: int, end: int, workspace: Array) -> Array:
    """The tokens [n, D] in a page's slots begin .. end-1; in place where they are float32."""
    prefer_wide_vectors()  # type: ignore[call-arg]
    if encoding == FLOAT32:
        return wide[page, begin:end]
    for i in range(end - begin):
        bits, token, token_bits = narrow[page, begin + i], workspace[i], workspace[i].view(np.uint32)
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
    return workspace[: end - begin]


@compile_loop
def _linear(x: Array, weight: Array, bias: Array, out: Array) -> None:
    """`x` [R, D] times the transposed `weight` [N, D], plus `bias` [N], into out [R, N]; the weight is read once."""
    rows, columns = aligned(*x.shape), np.empty((len(weight), len(x)), np.float32)
    rows[:] = x
    dots(weight, rows, columns)
    for row in range(len(x)):
        for n in range(len(weight)):
            out[row, n] = columns[n, row] + bias[n]


@compile_loop
def dots(a: Array, b: Array, out: Array) -> None:
    """All dot products of a [n, D] with b [m, D] into out[:n, :m]; four by three, so that a load serves several.

    Twelve sums are what fits in the registers of most machines; sixteen were written to memory and back.
    """
    prefer_wide_vectors()  # type: ignore[call-arg]
    dim = a.shape[1]
    # For fewer than three, what counts is memory, which is read faster in one stream than in four.
    whole_a, whole_b = len(a) // 4 * 4 if len(b) >= 3 else 0, len(b) // 3 * 3
    zero = np.float32(0)
    for i in range(0, whole_a, 4):
        a0, a1, a2, a3 = a[i], a[i + 1], a[i + 2], a[i + 3]
        for j in range(0, whole_b, 3):
            b0, b1, b2 = b[j], b[j + 1], b[j + 2]
            s00 = s01 = s02 = s10 = s11 = s12 = zero
            s20 = s21 = s22 = s30 = s31 = s32 = zero
            for d in range(dim):
                s00 += a0[d] * b0[d]
                s01 += a0[d] * b1[d]
                s02 += a0[d] * b2[d]
                s10 += a1[d] * b0[d]
                s11 += a1[d] * b1[d]
                s12 += a1[d] * b2[d]
                s20 += a2[d] * b0[d]
                s21 += a2[d] * b1[d]
                s22 += a2[d] * b2[d]
                s30 += a3[d] * b0[d]
                s31 += a3[d] * b1[d]
                s32 += a3[d] * b2[d]
            out[i, j], out[i, j + 1], out[i, j + 2] = s00, s01, s02
            out[i + 1, j], out[i + 1, j + 1], out[i + 1, j + 2] = s10, s11, s12
            out[i + 2, j], out[i + 2, j + 1], out[i + 2, j + 2] = s20, s21, s22
            out[i + 3, j], out[i + 3, j + 1], out[i + 3, j + 2] = s30, s31, s32
        for j in range(whole_b, len(b)):
            b0 = b[j]
            s00 = s10 = s20 = s30 = zero
            for d in range(dim):
                s00 += a0[d] * b0[d]
                s10 += a1[d] * b0[d]
                s20 += a2[d] * b0[d]
                s30 += a3[d] * b0[d]
            out[i, j], out[i + 1, j], out[i + 2, j], out[i + 3, j] = s00, s10, s20, s30
    for i in range(whole_a, len(a)):
        for j in range(len(b)):
            total = zero
            for d in range(dim):
                total += a[i, d] * b[j, d]
            out[i, j] = total


@compile_loop
def _add_weighted(shares: Array, tokens: Array, z: Array) -> None:
    """Add to z [H, D] the sums of tokens [n, D] weighted by shares [H, :n]; eight tokens at once."""
    prefer_wide_vectors()  # type: ignore[call-arg]
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


def signatures() -> list[tuple[Any, tuple[Any, ...]]]:
    """The loops that `compiled` calls, with the types of what it calls them with."""

    def array(ndim: int, dtype: npt.DTypeLike = np.float32) -> Any:
        return numba.typeof(np.empty((0,) * ndim, dtype))  # type: ignore[no-untyped-call]

    vector, matrix, cube = array(1), array(2), array(3)
    integer, indexes, found = numba.types.int64, array(2, np.int64), (array(3, np.int64), cube)
    to_fold, to_project = (matrix, vector, matrix, vector, cube), (cube, matrix, vector)
    contents, searches = (cube, array(3, np.uint16), integer), array(1, SEARCH)
    written = (indexes, matrix, cube, cube, cube)
    return [
        (answer, (matrix, *to_fold, *to_project, *contents, searches, matrix, *written, matrix)),
        (read, (*contents, searches, matrix, cube, matrix, *written)),
        (fold, (matrix, *to_fold, matrix, cube)),
        (project, (cube, *to_project, matrix)),
        (score, (searches, matrix, integer, *found)),
        (attend, (*contents, searches, *found, cube, matrix, *written)),
        (choose, (searches, *found, indexes, matrix)),
    ]
