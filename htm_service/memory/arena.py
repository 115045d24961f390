"""Storage of chunk contents: pages of one width, chunk size and dtype, in slabs, within a budget.

A page holds one chunk, [C, D]. Sessions hold page ids; the arena hands them out and takes them back.
On a CPU all slabs lie in one reservation of address space as large as the budget, so that kernels see one
tensor [P, C, D]; memory is taken by the first write to a page and given back with its slab. On a GPU, which has
no such thing, each slab is an allocation of its own.
Does not know sessions, summary keys or positions. One thread at a time: the device thread.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from htm_service.errors import OutOfMemory
from htm_service.memory.sketches.code import Rotation

SLAB_BYTES = 256 << 20
"""Size of one allocation on the device; smaller under a small budget."""


@dataclass(slots=True)
class Budget:
    """Bytes that the arenas and the summary keys may take together on the device."""

    limit_bytes: int
    used_bytes: int = 0

    def take(self, num_bytes: int) -> None:
        """Count bytes as used. Raises OutOfMemory, and counts nothing, when they do not fit."""
        if self.used_bytes + num_bytes > self.limit_bytes:
            raise OutOfMemory(f"{num_bytes} bytes more are needed, {self.used_bytes} of {self.limit_bytes} are in use")
        self.used_bytes += num_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes that may still be taken."""
        return self.limit_bytes - self.used_bytes

    def give(self, num_bytes: int) -> None:
        """Count bytes as free again."""
        self.used_bytes -= num_bytes


class Arena:
    """All pages of one (D, C, dtype) on one device; a page id is slab index x pages per slab + place.

    Raises OutOfMemory when the address space cannot be reserved.
    """

    def __init__(
        self,
        dim: int,
        chunk_size: int,
        dtype: torch.dtype,
        device: torch.device,
        budget: Budget,
    ) -> None:
        self.dim = dim
        self.chunk_size = chunk_size
        self.dtype = dtype
        self.device = device
        self.page_bytes = dim * chunk_size * dtype.itemsize
        slab_bytes = max(self.page_bytes, min(SLAB_BYTES, budget.limit_bytes // 16))
        self.slab_pages = slab_bytes // self.page_bytes
        self.slab_bytes = self.slab_pages * self.page_bytes
        self._budget = budget
        self._reserved: mmap.mmap | None = None
        self.contents: torch.Tensor | None = None
        """All pages [P, C, D] on a CPU, None on other devices."""
        self.floats: npt.NDArray[np.float32] | None = None
        """The same for numpy, of float32 alone."""
        if device.type == "cpu":
            num_slabs = max(1, budget.limit_bytes // self.slab_bytes)
            num_bytes = num_slabs * self.slab_bytes
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
            try:
                self._reserved = mmap.mmap(-1, num_bytes, flags=flags)
            except OSError as error:
                raise OutOfMemory(f"{num_bytes} bytes of address space cannot be reserved: {error}") from error
            if hasattr(mmap, "MADV_HUGEPAGE"):  # chunks are read whole: larger pages of the system cost fewer look-ups
                self._reserved.madvise(mmap.MADV_HUGEPAGE)
            flat = torch.frombuffer(self._reserved, dtype=dtype)
            self.contents = flat.view(num_slabs * self.slab_pages, chunk_size, dim)
            self.floats = self.contents.numpy() if dtype == torch.float32 else None
        self._num_more: dict[int, int] = {}
        """Of pages that several sessions hold: how many but one."""
        self._slabs: list[torch.Tensor | None] = []
        self._free: list[_FreePages] = []
        """Those of each slab."""

    @cached_property
    def rotation(self) -> Rotation:
        """What sketches of tokens of this width are made with."""
        return Rotation(self.dim, self.device)

    @property
    def max_pages(self) -> int:
        """Pages there are when all of the budget is this arena's."""
        return self._budget.limit_bytes // self.slab_bytes * self.slab_pages

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give."""
        new_slabs = self._budget.free_bytes // self.slab_bytes
        return sum(len(free) for free in self._free) + new_slabs * self.slab_pages

    @property
    def slab_addresses(self) -> list[int]:
        """Where each slab begins on the device, 0 for one that was released."""
        return [0 if slab is None else slab.data_ptr() for slab in self._slabs]

    def num_free_outside(self, slab: int) -> int:
        """Free pages of the slabs there are, less one of them."""
        return sum(len(free) for index, free in enumerate(self._free) if index != slab)

    def allocate(self, num_pages: int, avoid: int | None = None) -> list[int]:
        """Take pages, all or none, and none of the slab `avoid`. Raises OutOfMemory."""
        pages: list[int] = []
        try:
            while len(pages) < num_pages:
                free = next((free for index, free in enumerate(self._free) if free and index != avoid), None)
                if free is None:
                    free = self._add_slab()
                pages += free.take(num_pages - len(pages))
        except OutOfMemory:
            self.free(pages)
            raise
        return pages

    def share(self, pages: list[int]) -> None:
        """Count pages as held once more: each is in use until it was given back as often."""
        for page in pages:
            self._num_more[page] = self._num_more.get(page, 0) + 1

    def is_shared(self, page: int) -> bool:
        """Whether several hold a page."""
        return page in self._num_more

    def free(self, pages: list[int]) -> None:
        """Give pages back; a slab with no page in use is released."""
        if self._num_more:
            pages = [page for page in pages if not self._let_go(page)]
        touched = set()
        for page in reversed(pages):
            self._free[page // self.slab_pages].give(page)
            touched.add(page // self.slab_pages)
        for index in touched:
            if len(self._free[index]) == self.slab_pages:
                self._slabs[index] = None
                self._free[index] = _FreePages(0, 0)
                self._forget(index)
                self._budget.give(self.slab_bytes)

    def _let_go(self, page: int) -> bool:
        """Whether a page that was given back is still held."""
        num_more = self._num_more.pop(page, 0)
        if num_more > 1:
            self._num_more[page] = num_more - 1
        return num_more > 0

    def page(self, page: int) -> torch.Tensor:
        """One page [C, D], a view."""
        slab = self._slabs[page // self.slab_pages]
        assert slab is not None, f"page {page} is not in use"
        return slab[page % self.slab_pages]

    def put(self, pages: list[int], contents: torch.Tensor) -> None:
        """Fill pages with `contents` [N, C, D]; pages that follow each other in one step."""
        first = 0
        for place in range(1, len(pages) + 1):
            is_end = place == len(pages) or pages[place] != pages[place - 1] + 1 or pages[place] % self.slab_pages == 0
            if is_end:
                at = pages[first] % self.slab_pages
                self._slab(pages[first] // self.slab_pages)[at : at + place - first] = contents[first:place]
                first = place

    def take(self, pages: torch.Tensor) -> torch.Tensor:
        """Pages [N] (int64) as a copy of their contents [N, C, D]."""
        shape = (len(pages), self.chunk_size, self.dim)
        contents = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.take_into(pages, contents)
        return contents

    def take_into(self, pages: torch.Tensor, contents: torch.Tensor) -> None:
        """Copy pages [N] (int64) into `contents` [N, C, D], converting to its dtype."""
        if self.contents is not None and contents.dtype == self.dtype:
            torch.index_select(self.contents, 0, pages, out=contents)
            return
        if self.contents is not None:
            contents.copy_(self.contents.index_select(0, pages))
            return
        slab_of = pages // self.slab_pages
        for index in slab_of.unique().tolist():
            rows = (slab_of == index).nonzero().squeeze(1)
            places = pages[rows] - index * self.slab_pages
            contents[rows] = self._slab(index).index_select(0, places).to(contents.dtype)

    def take_to_host(self, pages: list[int]) -> npt.NDArray[np.float32]:
        """Pages as a copy of their contents [N, C, D] in float32, on the host."""
        if self.contents is None:
            return np.asarray(self.take(torch.tensor(pages, dtype=torch.int64, device=self.device)).float().cpu())
        # Not by torch, whose threads would have to be woken for it: on a busy machine that takes longer than the copy.
        if self.dtype == torch.bfloat16:  # the upper half of a float32
            upper = self.contents.view(torch.uint16).numpy()[pages].astype(np.uint32)
            return (upper << 16).view(np.float32)
        return np.asarray(self.contents.numpy()[pages], np.float32)

    def _slab(self, index: int) -> torch.Tensor:
        slab = self._slabs[index]
        assert slab is not None, f"slab {index} is not allocated"
        return slab

    def _add_slab(self) -> _FreePages:
        self._budget.take(self.slab_bytes)
        vacant = (index for index, old in enumerate(self._slabs) if old is None)
        index = next(vacant, len(self._slabs))
        if self.contents is not None:
            slab = self.contents[index * self.slab_pages : (index + 1) * self.slab_pages]
        else:
            shape = (self.slab_pages, self.chunk_size, self.dim)
            try:
                slab = torch.empty(shape, dtype=self.dtype, device=self.device)
            except RuntimeError as error:
                self._budget.give(self.slab_bytes)
                raise OutOfMemory(f"{self.slab_bytes} bytes cannot be allocated: {error}") from error
        if index == len(self._slabs):
            self._slabs.append(None)
            self._free.append(_FreePages(0, 0))
        self._slabs[index] = slab
        self._free[index] = _FreePages(index * self.slab_pages, self.slab_pages)
        return self._free[index]

    def _forget(self, index: int) -> None:
        """Give a slab's memory back to the system, as far as whole pages of the system lie in it."""
        if self._reserved is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        begin = -(-index * self.slab_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (index + 1) * self.slab_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            self._reserved.madvise(mmap.MADV_DONTNEED, begin, end - begin)


class _FreePages:
    """The free pages of one slab, `num_pages` from `first` on at the start.

    What was never handed out is a range, not a list: of small pages a slab has millions, whose numbers would take many
    times the slab's own memory, and seconds of each full run of the garbage collector.
    """

    def __init__(self, first: int, num_pages: int) -> None:
        self._returned: list[int] = []
        self._unused = range(first, first + num_pages)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._returned) + len(self._unused)

    def take(self, most: int) -> list[int]:
        """Up to `most` of them: the last that came back first, then what was never handed out, in rising order."""
        cut = max(0, len(self._returned) - most)
        pages = self._returned[cut:][::-1]
        del self._returned[cut:]
        num_unused = most - len(pages)
        pages += self._unused[:num_unused]
        self._unused = self._unused[num_unused:]
        return pages

    def give(self, page: int) -> None:
        """Take one back."""
        self._returned.append(page)
