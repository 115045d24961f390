"""The Triton kernel's device code: four launches read a whole batch's keys and contents where they lie.

`score_keys` reads each key once for all rows of its search, and keeps the best of every piece of keys; `choose` merges
these lists to the chunks a row takes; `score_tokens` gives the logits of their tokens, of which the host has torch make
a softmax; `add_up` sums the tokens with that.
A candidate is one int64, the score above the complement of the index: greater is better, and of equal scores the
lower index is. A score that is not finite is greater than all others, so the first of a row's candidates tells of it.
Dimensions are padded to powers of two and masked. All arithmetic is float32.
Shapes: S searches, R rows of the batch, T tiles, D width, H heads, C chunk size, K chunks per row.
"""

from __future__ import annotations

import triton
import triton.language as tl

KEYS, PAGES, TOKEN_MASK, HIDDEN, HIDDEN_STRIDE, NUM_KEYS, FIRST, START, STOP, NUM_ROWS, TAKES, ENDS, OWN_KEYS = (
    tl.constexpr(column) for column in range(13)
)
FIRST_ROW, FIRST_LIST = tl.constexpr(13), tl.constexpr(14)
"""Columns of the table of searches: `kernels.base.Search.numbers`, its first row in the batch, its first list of
candidates."""
COLUMNS = tl.constexpr(15)
LOW = tl.constexpr(0xFFFFFFFF)
NOT_FINITE = tl.constexpr(0x7FFFFFFF)
"""Stands for a score above all finite ones."""
NONE = tl.constexpr(-(2**63))
"""No candidate."""


@triton.jit
def score_keys(
    searches,  # [S, COLUMNS] int64
    tiles,  # [T, 2] int64: a search, and the number of this tile in it
    summary,  # [R, D]
    lists,  # [.., LIST] int64: a list per row and piece; written
    dim,
    ALIGNMENT: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    LIST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Score a piece of a search's keys for some of its rows, and list the best of each row, best first."""
    tile = tiles + 2 * tl.program_id(0)
    search = searches + tl.load(tile) * COLUMNS
    number = tl.load(tile + 1)
    num_rows, num_keys = tl.load(search + NUM_ROWS), tl.load(search + NUM_KEYS)
    row_blocks = tl.cdiv(num_rows, ROWS)
    piece = number // row_blocks  # the row blocks of a piece follow each other: they find its keys in the cache
    row = number % row_blocks * ROWS + tl.arange(0, ROWS)
    key = piece * PIECE + tl.arange(0, PIECE)
    is_row, is_key = row < num_rows, key < num_keys
    keys = _pointer(tl.load(search + KEYS), tl.float32, ALIGNMENT)
    summary += tl.load(search + FIRST_ROW) * dim
    scores = tl.zeros([ROWS, PIECE], tl.float32)
    ends, own_keys = tl.load(search + ENDS), _pointer(tl.load(search + OWN_KEYS), tl.float32, ALIGNMENT)
    of_own = tl.zeros([ROWS], tl.float32)
    for start in range(0, dim, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_column = column < dim
        is_own = is_row[:, None] & is_column[None, :] & (ends != 0)
        a = tl.load(
            summary + row[:, None] * dim + column[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0
        )
        b = tl.load(keys + key[None, :] * dim + column[:, None], mask=is_key[None, :] & is_column[:, None], other=0.0)
        scores = tl.dot(a, b, scores, input_precision="ieee")
        of_own += tl.sum(a * tl.load(own_keys + row[:, None] * dim + column[None, :], mask=is_own, other=0.0), 1)
    is_seen = is_row[:, None] & is_key[None, :]
    end = _pointer(ends, tl.int64, 8) + 3 * row
    num_whole = tl.load(end, mask=is_row & (ends != 0), other=0)[:, None]
    own = tl.load(end + 1, mask=is_row & (ends != 0), other=-1)[:, None]
    scores = tl.where(key[None, :] == own, of_own[:, None], scores)
    is_seen &= (ends == 0) | (key[None, :] < num_whole) | (key[None, :] == own)
    hidden = tl.load(search + HIDDEN)
    flag = row[:, None] * tl.load(search + HIDDEN_STRIDE) + key[None, :]
    is_hidden = tl.load(_pointer(hidden, tl.int8, 1) + flag, mask=is_seen & (hidden != 0), other=0)
    candidates = tl.where(is_seen & (is_hidden == 0), _pack(scores, key[None, :]), NONE)
    best = tl.topk(candidates, LIST)
    at = tl.load(search + FIRST_LIST) + row * tl.cdiv(num_keys, PIECE) + piece
    tl.store(lists + at[:, None] * LIST + tl.arange(0, LIST)[None, :], best, mask=is_row[:, None])


@triton.jit(do_not_specialize=["width"])
def choose(
    searches,  # [S, COLUMNS] int64
    search_of_row,  # [R] int64
    slabs,  # [..] int64: where each slab of the arena begins
    lists,  # [.., LIST] int64: what `score_keys` found
    chunk_index,  # [R, K] int64; written
    chunk_weight,  # [R, K]; written
    contents,  # [R, K] int64: where each chunk's contents begin, 0 for none; written
    width,  # K
    slab_pages,
    page_bytes,
    PIECE: tl.constexpr,
    LIST: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """The chunks that a row takes, their softmax weights, and where they are; none, and NaN, after an overflow."""
    row = tl.program_id(0).to(tl.int64)
    search = searches + tl.load(search_of_row + row) * COLUMNS
    pieces = tl.cdiv(tl.load(search + NUM_KEYS), PIECE)
    lists += (tl.load(search + FIRST_LIST) + (row - tl.load(search + FIRST_ROW)) * pieces) * LIST
    best = tl.full([LIST], NONE, tl.int64)
    for start in range(0, pieces * LIST, CANDIDATES):
        at = start + tl.arange(0, CANDIDATES)
        found = tl.topk(tl.load(lists + at, mask=at < pieces * LIST, other=NONE), LIST)
        best = tl.topk(tl.join(best, found).reshape([2 * LIST]), LIST)
    place = tl.arange(0, LIST)
    overflowed = tl.max(best, 0) >> 32 == NOT_FINITE
    is_taken = (best != NONE) & (place < tl.load(search + TAKES)) & (overflowed == 0)
    score = tl.where(is_taken, _unpack(best), -float("inf"))
    weight = tl.where(is_taken, tl.exp(score - tl.max(score, 0)), 0.0)
    weight = tl.where(is_taken, weight / tl.sum(weight, 0), 0.0)
    weight = tl.where(overflowed, float("nan"), weight)
    index = LOW - (best & LOW)
    page = tl.load(_pointer(tl.load(search + PAGES), tl.int64, 8) + index, mask=is_taken, other=-1)
    slab = tl.load(slabs + page // slab_pages, mask=page >= 0, other=0)
    at = row * width + place
    tl.store(chunk_index + at, tl.where(is_taken, index + tl.load(search + FIRST), -1), mask=place < width)
    tl.store(chunk_weight + at, weight, mask=place < width)
    tl.store(contents + at, tl.where(page >= 0, slab + page % slab_pages * page_bytes, 0), mask=place < width)


@triton.jit(do_not_specialize=["width"])
def score_tokens(
    searches,  # [S, COLUMNS] int64
    search_of_row,  # [R] int64
    heads,  # [R, H, D]
    positions,  # [C, D], or None
    chunk_index,  # [R, K] int64
    contents,  # [R, K] int64
    logits,  # [R, K, H, C]; written: -inf where not visible, NaN where they overflowed
    width,  # K
    num_heads,
    dim,
    size,  # C
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Score some tokens of one of a row's chunks for some of its heads."""
    row = tl.program_id(0).to(tl.int64)
    search = searches + tl.load(search_of_row + row) * COLUMNS
    taken = row * width + tl.program_id(1) % width
    slot = tl.program_id(1) // width * SLOTS + tl.arange(0, SLOTS)
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    page = tl.load(contents + taken)
    is_visible = _is_visible(search, row, tl.load(chunk_index + taken), page, slot, size)
    scores = tl.zeros([HEADS, SLOTS], tl.float32)
    for start in range(0, dim, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_there = (head < num_heads)[:, None] & (column < dim)[None, :]
        a = tl.load(heads + (row * num_heads + head[:, None]) * dim + column[None, :], mask=is_there, other=0.0)
        b = _tokens(_pointer(page, DTYPE, ALIGNMENT), positions, slot, column, is_visible, dim)
        scores = tl.dot(a, tl.trans(b), scores, input_precision="ieee")
    scores = tl.where(tl.abs(scores) < float("inf"), scores, float("nan"))
    at = (taken * num_heads + head[:, None]) * size + slot[None, :]
    is_there = (head < num_heads)[:, None] & (slot < size)[None, :]
    tl.store(logits + at, tl.where(is_visible[None, :], scores, -float("inf")), mask=is_there)


@triton.jit(do_not_specialize=["width"])
def add_up(
    searches,  # [S, COLUMNS] int64
    search_of_row,  # [R] int64
    positions,  # [C, D], or None
    chunk_index,  # [R, K] int64
    chunk_weight,  # [R, K]
    contents,  # [R, K] int64
    shares,  # [R, K, H, C]: softmax of the logits, anything where not visible
    z,  # [R, H, D]; written
    width,  # K
    num_heads,
    dim,
    size,  # C
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some columns of a row's sum over chunks of weight x share x token, for some heads."""
    row = tl.program_id(0).to(tl.int64)
    search = searches + tl.load(search_of_row + row) * COLUMNS
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    total = tl.zeros([HEADS, BLOCK], tl.float32)
    for place in range(tl.load(search + TAKES)):
        taken = row * width + place
        chunk, page, weight = tl.load(chunk_index + taken), tl.load(contents + taken), tl.load(chunk_weight + taken)
        for start in range(0, size, SLOTS):
            slot = start + tl.arange(0, SLOTS)
            is_visible = _is_visible(search, row, chunk, page, slot, size)
            is_there = (head < num_heads)[:, None] & is_visible[None, :]
            share = tl.load(
                shares + (taken * num_heads + head[:, None]) * size + slot[None, :], mask=is_there, other=0.0
            )
            tokens = _tokens(_pointer(page, DTYPE, ALIGNMENT), positions, slot, column, is_visible, dim)
            total = tl.dot(share * weight, tokens, total, input_precision="ieee")
    at = (row * num_heads + head[:, None]) * dim + column[None, :]
    tl.store(z + at, total, mask=(head < num_heads)[:, None] & (column < dim)[None, :])


@triton.jit
def _is_visible(search, row, chunk, page, slot, size):
    """Which slots of a chunk hold a token that a row sees; none where its contents are not here."""
    position = chunk * size + slot
    ends, row_of_search = tl.load(search + ENDS), row - tl.load(search + FIRST_ROW)
    end = tl.load(_pointer(ends, tl.int64, 8) + 3 * row_of_search + 2, mask=ends != 0, other=0)
    stop = tl.where(ends != 0, end, tl.load(search + STOP))
    seen = (slot < size) & (position >= tl.load(search + START)) & (position < stop) & (page != 0)
    token_mask = tl.load(search + TOKEN_MASK)
    marked = tl.load(_pointer(token_mask, tl.int8, 1) + position, mask=seen & (token_mask != 0), other=1)
    return seen & (marked != 0)


@triton.jit
def _tokens(page, positions, slot, column, is_visible, dim):
    """Columns of a page's visible tokens plus positions, 0 elsewhere: slots never written hold anything, even NaN."""
    at = slot[:, None] * dim + column[None, :]
    is_there = is_visible[:, None] & (column < dim)[None, :]
    tokens = tl.load(page + at, mask=is_there, other=0.0).to(tl.float32)
    if positions is not None:
        tokens += tl.load(positions + at, mask=is_there, other=0.0)
    return tokens


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """An address as a pointer; the compiler takes the alignment's word for how wide it may load."""
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), ALIGNMENT)


@triton.jit
def _pack(scores, index):
    """Scores and indexes as candidates."""
    bits = _in_order(scores.to(tl.int32, bitcast=True))
    bits = tl.where(tl.abs(scores) < float("inf"), bits, NOT_FINITE)
    return (bits.to(tl.int64) << 32) | (LOW - index)


@triton.jit
def _unpack(candidates):
    """Candidates as scores."""
    return _in_order((candidates >> 32).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _in_order(bits):
    """A float's bits as an integer of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
