"""The read path as a small C++ extension: compiled by g++ at run time for one shape, called through ctypes."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.candidates.workload import Workload
from htm_service.kernels.compiled import CompiledKernel, _share_out, _table
from htm_service.kernels.loops import Array

SOURCE = Path(__file__).with_name("kernel.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=fast", "-Wall", "-Werror")


def compile_for(workload: Workload) -> ctypes.CDLL:
    """The library for this workload's D, H, E, C. Raises CalledProcessError with the compiler's words."""
    size = workload.size
    shape = {"D": size.dim, "H": size.heads, "E": size.dim_head, "C": size.chunk_size}
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "kernel.so"
        macros = [f"-D{name}={number}L" for name, number in shape.items()]
        subprocess.run(["g++", *FLAGS, *macros, str(SOURCE), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


def prepare(workload: Workload, num_threads: int) -> Callable[[], Tensor]:
    """Rows shared out as in the compiled kernel, with its threads; ctypes holds no interpreter lock meanwhile."""
    library, threads = compile_for(workload), CompiledKernel(num_threads)
    weights, positions, contents = workload.projections, workload.positions, workload.arena.contents
    assert contents is not None
    num_rows, num_heads, dim = len(workload.queries), workload.size.heads, workload.size.dim
    row_parts = threads._num_parts(num_rows)
    num_keys = sum(len(search.keys) * search.num_queries for search in workload.searches)
    key_parts = max(1, min(num_threads, num_keys * dim // threads.products_per_thread)) if row_parts == 1 else 1

    # Made once, because torch's memory is fresh from the system every time; and numpy fills, because torch would wake
    # threads for it: either cost as much as the arithmetic.
    summary, heads = torch.empty(num_rows, dim), torch.empty(num_rows, num_heads, dim)
    z, output = torch.empty(num_rows, num_heads, dim), torch.empty(num_rows, dim)

    def answer() -> Tensor:
        z.numpy().fill(0)

        def answer_part(rows: slice, table: Array) -> None:
            num, k = rows.stop - rows.start, int(table["k"][0])
            index = np.full((num, key_parts, k), -1)
            logit = np.full(index.shape, -np.inf, np.float32)
            _call(library.fold, num, workload.queries[rows], *weights[:5], summary[rows], heads[rows])
            scored = (table, len(table), summary[rows])
            threads._together(
                [partial(_call, library.score, *scored, part, key_parts, k, index, logit) for part in range(key_parts)]
            )
            chosen = (key_parts, k, index, logit)
            _call(library.attend, contents, table, len(table), *chosen, heads[rows], positions, z[rows])
            _call(library.project, num, z[rows], *weights[5:], output[rows])

        parts = _share_out(_table(workload.searches), num_rows, row_parts)
        threads._together([partial(answer_part, *part) for part in parts])
        return output

    return answer


def _call(function: Any, *arguments: Any) -> None:
    """Tensors and arrays as addresses, numbers as long."""

    def convert(argument: Any) -> Any:
        if isinstance(argument, int):
            return ctypes.c_long(argument)
        return ctypes.c_void_p(argument.data_ptr() if isinstance(argument, Tensor) else argument.ctypes.data)

    function(*(convert(argument) for argument in arguments))
