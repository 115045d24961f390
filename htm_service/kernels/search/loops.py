"""The compiled search's loops, machine code like `kernels/loops.py`, and written by the same rules.

`collect` goes once over the keys and sketches of a part of the chunks and keeps, for each row, the tokens that they
estimate best, and of chunks without sketches the tokens that score best; `finish` scores the former, and then all
others that may be better than the worst of the answer. What is kept is a heap of a fixed size with the worst token on
top, so nothing is ever sorted but the answer.
Shapes: S searches, R rows, D width, C chunk size, W words of a sketch, B bits of a quantised query, P parts, T the
chunks of all rows, row by row.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba.core import types
from numba.extending import intrinsic

from htm_service.kernels.loops import (
    KEYS_AT_ONCE,
    Array,
    aligned,
    array_at,
    compile_loop,
    dots,
    page_tokens,
    prefer_wide_vectors,
)

QUERY_BITS = 4
"""Of each dimension of P u: more would not be seen beside the one bit of the tokens."""
TOKEN_SEARCH = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("keys", "pages", "bits", "factors", "token_mask", "known"),
            *("num_chunks", "first", "start", "stop", "num_queries", "num_wanted", "num_scored"),
        )
    ]
)
"""A `kernels.search.base.TokenSearch`; the first six are addresses, 0 for none."""


@intrinsic
def _count_ones(typing_context: Any, word: Any) -> Any:
    """The ones of a word (uint64)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


@compile_loop
def collect(
    wide: Array,  # as in `loops.attend`
    narrow: Array,
    encoding: int,
    searches: Array,  # [S] TOKEN_SEARCH
    queries: Array,  # [R, D]
    rotated: Array,  # [R, W x 64]
    error: float,  # how far an estimate may be off, for a factor of 1 and a query of length 1
    slots: Array,  # [R, C]
    part: int,
    guess: Array,  # [R, P, G], -inf, and `guessed` [R, P, G] int64, -1: estimates and their tokens; written at `part`
    guessed: Array,
    score: Array,  # [R, P, N], -inf, and `scored` [R, P, N] int64, -1: the scores of other tokens; written at `part`
    scored: Array,
    bound: Array,  # [T, C], and `top` [T], -inf, the greatest of each chunk: what a token may score; written
    top: Array,
    lacking: Array,  # [sum of the m] bool, False: chunks whose contents are not here; written
    overflowed: Array,  # [R, P] bool, False; written
) -> None:
    """Go over the chunks of one of P equal parts of each search."""
    num_parts, row, first_chunk, first_bound = guess.shape[1], 0, 0, 0
    planes = np.empty((len(queries), QUERY_BITS, rotated.shape[1] // 64), np.uint64)
    step, spread = np.empty(len(queries), np.float32), np.empty(len(queries), np.float32)
    _quantise(rotated, error, planes, step, spread)
    for s in range(len(searches)):
        search = searches[s]
        rows = slice(row, row + search.num_queries)
        begin, end = search.num_chunks * part // num_parts, search.num_chunks * (part + 1) // num_parts
        bounds = slice(first_bound, first_bound + search.num_queries * search.num_chunks)
        _collect(
            *(wide, narrow, encoding, search, begin, end),
            *(queries[rows], planes[rows], step[rows], spread[rows], slots[rows]),
            *(guess[rows, part], guessed[rows, part], score[rows, part], scored[rows, part]),
            *(bound[bounds], top[bounds]),
            *(lacking[first_chunk : first_chunk + search.num_chunks], overflowed[rows, part]),
        )
        row, first_chunk, first_bound = rows.stop, first_chunk + search.num_chunks, bounds.stop


@compile_loop
def _collect(
    wide: Array,
    narrow: Array,
    encoding: int,
    search: Any,
    begin: int,
    end: int,
    queries: Array,  # [Q, D]
    planes: Array,  # [Q, B, W]
    step: Array,  # [Q]
    spread: Array,  # [Q]
    slots: Array,  # [Q, C]
    guess: Array,  # [Q, G]
    guessed: Array,
    score: Array,  # [Q, N]
    scored: Array,
    bound: Array,  # [Q m, C]
    top: Array,  # [Q m]
    lacking: Array,  # [m]
    overflowed: Array,  # [Q]
) -> None:
    """The chunks begin .. end-1 of one search."""
    prefer_wide_vectors()  # type: ignore[call-arg]
    num_rows, dim, size, num_words = len(queries), queries.shape[1], slots.shape[1], planes.shape[2]
    num_chunks = search.num_chunks
    keys = array_at(search.keys, queries, (num_chunks, dim))
    pages = array_at(search.pages, guessed, (num_chunks,))
    bits = array_at(search.bits, planes, (num_chunks, num_words, size))
    factors = array_at(search.factors, queries, (num_chunks, size))
    known = array_at(search.known, queries, (num_rows, num_chunks, size))
    marked = array_at(search.token_mask, lacking, (search.stop,))
    num_guesses, num_wanted = min(search.num_scored, guess.shape[1]), search.num_wanted
    rows, sums = aligned(num_rows, dim), np.empty((KEYS_AT_ONCE, num_rows), np.float32)
    rows[:] = queries
    workspace, scores = aligned(size, dim), np.empty((size, num_rows), np.float32)
    estimates, counts = np.empty(size, np.float32), np.empty(size, np.uint64)
    for start in range(begin, end, KEYS_AT_ONCE):
        block = keys[start : min(start + KEYS_AT_ONCE, end)]
        if search.bits != 0:
            dots(block, rows, sums)
        for i in range(len(block)):
            chunk = start + i
            at = (search.first + chunk) * size
            low, high = max(0, search.start - at), min(size, search.stop - at)
            if low >= high:
                continue
            if search.bits != 0 and not np.isnan(factors[chunk, 0]):
                for q in range(num_rows):
                    at_bound = q * num_chunks + chunk
                    around = sums[i, q]
                    if not np.isfinite(around):  # it says nothing of its tokens: they are looked at
                        around = np.float32(np.inf)
                    top[at_bound] = _estimate(
                        *(bits[chunk], factors[chunk], planes[q], step[q], spread[q], around, slots[q]),
                        *(counts, estimates, bound[at_bound]),
                    )
                    worst = guess[q, 0]
                    if top[at_bound] <= worst:
                        continue
                    for slot in range(low, high):
                        estimate = estimates[slot]
                        if not estimate <= worst and (search.token_mask == 0 or marked[at + slot]):
                            if np.isnan(estimate):
                                estimate = np.float32(np.inf)
                            _replace_worst(guess[q, :num_guesses], guessed[q, :num_guesses], estimate, at + slot)
                            worst = guess[q, 0]
                continue
            is_known = search.known != 0 and _all_known(known, chunk, marked, search.token_mask != 0, at, low, high)
            if not is_known:
                if search.token_mask != 0 and not marked[at + low : at + high].any():
                    continue
                if pages[chunk] < 0:
                    lacking[chunk] = True
                    continue
                tokens = page_tokens(wide, narrow, encoding, pages[chunk], low, high, workspace)
                dots(tokens, rows, scores)
            for q in range(num_rows):
                for slot in range(low, high):
                    if search.token_mask != 0 and not marked[at + slot]:
                        continue
                    found = known[q, chunk, slot] if is_known else scores[slot - low, q] + slots[q, slot]
                    if not np.isfinite(found):
                        overflowed[q] = True
                    elif found > score[q, 0]:
                        _replace_worst(score[q, :num_wanted], scored[q, :num_wanted], found, at + slot)


@compile_loop
def _all_known(known: Array, chunk: int, marked: Array, is_masked: bool, at: int, low: int, high: int) -> bool:
    """Whether every row knows the scores of a chunk's visible tokens."""
    for q in range(len(known)):
        for slot in range(low, high):
            if np.isnan(known[q, chunk, slot]) and (not is_masked or marked[at + slot]):
                return False
    return True


@compile_loop
def _quantise(rotated: Array, error: float, planes: Array, step: Array, spread: Array) -> None:
    """P u [R, E] as `step` [R] times odd numbers of B bits, bit by bit: planes [R, B, W]; with factors, `spread` [R]
    is how far estimates may be off.
    """
    most = 2**QUERY_BITS - 1
    for r in range(len(rotated)):
        greatest, squares = np.float32(0), np.float32(0)
        for e in range(rotated.shape[1]):
            greatest = max(greatest, np.abs(rotated[r, e]))
            squares += rotated[r, e] * rotated[r, e]
        spread[r] = np.float32(error) * np.sqrt(squares)
        step[r] = greatest / np.float32(most)
        scale = np.float32(most) / greatest if greatest > 0 else np.float32(0)
        planes[r] = 0
        for e in range(rotated.shape[1]):
            level = np.uint64(min(max(np.rint((rotated[r, e] * scale + most) * np.float32(0.5)), 0), most))
            for b in range(QUERY_BITS):
                planes[r, b, e // 64] |= ((level >> np.uint64(b)) & np.uint64(1)) << np.uint64(e % 64)


@compile_loop
def _estimate(
    bits: Array,  # [W, C]
    factors: Array,  # [C]
    planes: Array,  # [B, W]
    step: float,
    spread: float,
    around: float,
    slots: Array,  # [C]
    counts: Array,  # [C], a workspace
    estimates: Array,  # [C]; written
    bound: Array,  # [C]; written
) -> float:
    """What the sketches of one chunk say, and what its tokens may score; the greatest of that, NaN for an overflow.

    With t the signs of plane b and of the token, 2^b <t, t'> = 2^b (E - 2 x the ones of their difference).
    """
    prefer_wide_vectors()  # type: ignore[call-arg]
    num_words, size = bits.shape
    counts[:] = 0
    for w in range(num_words):
        ones, twos, fours, eights = planes[0, w], planes[1, w], planes[2, w], planes[3, w]
        for c in range(size):
            word = bits[w, c]
            counts[c] += (
                _count_ones(word ^ ones)
                + (_count_ones(word ^ twos) << np.uint64(1))
                + (_count_ones(word ^ fours) << np.uint64(2))
                + (_count_ones(word ^ eights) << np.uint64(3))
            )
    total = np.float32((2**QUERY_BITS - 1) * num_words * 64)
    for c in range(size):
        product = step * (total - np.float32(2) * np.float32(np.int64(counts[c])))
        estimates[c] = around + factors[c] * product + slots[c]
        bound[c] = estimates[c] + factors[c] * spread
    top = np.float32(-np.inf)
    for c in range(size):
        if not bound[c] <= top:
            top = bound[c]
    return top


@compile_loop
def finish(
    wide: Array,  # as in `collect`, from here
    narrow: Array,
    encoding: int,
    searches: Array,
    queries: Array,
    slots: Array,
    guess: Array,
    guessed: Array,
    score: Array,
    scored: Array,
    bound: Array,
    top: Array,
    lacking: Array,
    overflowed: Array,  # to here; all written
    begin: int,  # rows begin .. end-1 are finished
    end: int,
    best_score: Array,  # [R, N], -inf; written
    best: Array,  # [R, N] int64, -1; written
) -> None:
    """Of the tokens that all parts guessed, score the best, and put them together with those that were scored; then
    score all those that may be better than the worst of these.
    """
    row, first_chunk, first_bound = 0, 0, 0
    for s in range(len(searches)):
        search = searches[s]
        for q in range(search.num_queries):
            if begin <= row < end:
                lacks = lacking[first_chunk : first_chunk + search.num_chunks]
                bounds = slice(first_bound, first_bound + search.num_chunks)
                _finish(
                    *(wide, narrow, encoding, search, q, queries[row], slots[row], guess[row], guessed[row]),
                    *(score[row], scored[row], bound[bounds], top[bounds], lacks, overflowed[row]),
                    *(best_score[row, : search.num_wanted], best[row, : search.num_wanted]),
                )
            row += 1
            first_bound += search.num_chunks
        first_chunk += search.num_chunks


@compile_loop
def _finish(
    wide: Array,
    narrow: Array,
    encoding: int,
    search: Any,
    q: int,
    query: Array,  # [D]
    slots: Array,  # [C]
    guess: Array,  # [P, G]
    guessed: Array,
    score: Array,  # [P, N]
    scored: Array,
    bound: Array,  # [m, C]
    top: Array,  # [m]
    lacking: Array,  # [m]
    overflowed: Array,  # [P]
    best_score: Array,  # [n], -inf; written
    best: Array,  # [n], -1; written
) -> None:
    """One row."""
    num_parts, size, dim = len(guess), len(slots), len(query)
    num_guesses = min(search.num_scored, guess.shape[1])
    for part in range(1, num_parts):
        for i in range(num_guesses):
            if guessed[part, i] >= 0 and _is_worse(guess[0, 0], guessed[0, 0], guess[part, i], guessed[part, i]):
                _replace_worst(guess[0, :num_guesses], guessed[0, :num_guesses], guess[part, i], guessed[part, i])
    for part in range(num_parts):
        for i in range(len(best)):
            if scored[part, i] >= 0 and _is_worse(best_score[0], best[0], score[part, i], scored[part, i]):
                _replace_worst(best_score, best, score[part, i], scored[part, i])
    pages = array_at(search.pages, guessed, (search.num_chunks,))
    known = array_at(search.known, slots, (q + 1, search.num_chunks, size))
    marked = array_at(search.token_mask, lacking, (search.stop,))
    workspace, row, dot = aligned(1, dim), aligned(1, dim), np.empty((1, 1), np.float32)
    row[0] = query
    has_overflowed = overflowed.any()
    tokens = np.sort(guessed[0, :num_guesses])
    for i in range(num_guesses):
        if tokens[i] >= 0:
            chunk, slot = tokens[i] // size - search.first, tokens[i] % size
            bound[chunk, slot] = -np.inf  # not once more
            has_overflowed |= _score_token(
                *(wide, narrow, encoding, search.known != 0, known, q, pages, chunk, slot, row, slots, tokens[i]),
                *(workspace, dot, lacking, best_score, best),
            )
    threshold = best_score[0]
    for chunk in range(0 if lacking.any() else search.num_chunks):  # the threshold is not known before all are here
        if top[chunk] <= threshold:
            continue
        at = (search.first + chunk) * size
        for slot in range(max(0, search.start - at), min(size, search.stop - at)):
            if not bound[chunk, slot] <= threshold and (search.token_mask == 0 or marked[at + slot]):
                has_overflowed |= _score_token(
                    *(wide, narrow, encoding, search.known != 0, known, q, pages, chunk, slot, row, slots, at + slot),
                    *(workspace, dot, lacking, best_score, best),
                )
    _sort(best_score, best)
    if has_overflowed:
        best[:] = -1
        best_score[:] = np.nan


@compile_loop
def _score_token(
    wide: Array,
    narrow: Array,
    encoding: int,
    is_known: bool,
    known: Array,  # [Q, m, C]
    q: int,
    pages: Array,  # [m]
    chunk: int,
    slot: int,
    row: Array,  # [1, D]: the query
    slots: Array,  # [C]
    token: int,
    workspace: Array,  # [1, D]
    dot: Array,  # [1, 1], a workspace
    lacking: Array,  # [m]; written
    best_score: Array,  # [n]; written
    best: Array,  # [n]; written
) -> bool:
    """Score one token and keep it when it is among the best; whether its score overflowed."""
    found = known[q, chunk, slot] if is_known else np.float32(np.nan)
    if np.isnan(found):
        if pages[chunk] < 0:
            lacking[chunk] = True
            return False
        dots(page_tokens(wide, narrow, encoding, pages[chunk], slot, slot + 1, workspace), row, dot)
        found = dot[0, 0] + slots[slot]
    if not np.isfinite(found):
        return True
    if _is_worse(best_score[0], best[0], found, token):
        _replace_worst(best_score, best, found, token)
    return False


@compile_loop
def _is_worse(score: float, token: int, than: float, other: int) -> bool:
    """Whether a token, -1 for none, comes after another: a lower score, or the same and a higher position."""
    return score < than or (score == than and (token < 0 or token > other))


@compile_loop
def _replace_worst(score: Array, token: Array, new_score: float, new_token: int) -> None:
    """Put a better token into a heap [n] in the place of the worst, which is at 0."""
    place, num = 0, len(score)
    while 2 * place + 1 < num:
        child = 2 * place + 1
        if child + 1 < num and _is_worse(score[child + 1], token[child + 1], score[child], token[child]):
            child += 1
        if not _is_worse(score[child], token[child], new_score, new_token):
            break
        score[place], token[place] = score[child], token[child]
        place = child
    score[place], token[place] = new_score, new_token


@compile_loop
def _sort(score: Array, token: Array) -> None:
    """A heap [n] with the worst at 0 into an array with the best in front."""
    for last in range(len(score) - 1, 0, -1):
        worst, of = score[0], token[0]
        _replace_worst(score[:last], token[:last], score[last], token[last])
        score[last], token[last] = worst, of


def signatures() -> list[tuple[Any, tuple[Any, ...]]]:
    """The loops that `compiled` calls, with the types of what it calls them with."""

    def array(ndim: int, dtype: npt.DTypeLike = np.float32) -> Any:
        return numba.typeof(np.empty((0,) * ndim, dtype))  # type: ignore[no-untyped-call]

    matrix, cube, integer = array(2), array(3), numba.types.int64
    contents, searches = (cube, array(3, np.uint16), integer), array(1, TOKEN_SEARCH)
    lists = (cube, array(3, np.int64)) * 2
    told = (matrix, array(1), array(1, np.bool_), array(2, np.bool_))
    return [
        (collect, (*contents, searches, matrix, matrix, numba.types.float64, matrix, integer, *lists, *told)),
        (finish, (*contents, searches, matrix, matrix, *lists, *told, integer, integer, matrix, array(2, np.int64))),
    ]
