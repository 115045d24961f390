"""Compiles Triton's kernels for GPUs that need not be there; a JSON line for each, with what it takes of a GPU.

The host's side runs as it does on a GPU, so what is compiled is what it would launch, its arguments as they are.
Run by `test_triton.py` in a process of its own: in that of the tests, kernels are interpreted.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from htm_service.kernels import triton_loops
from htm_service.kernels.base import Batch, Search, View
from htm_service.kernels.triton_gpu import TritonKernel
from htm_service.memory.arena import Arena, Budget

KERNELS = ("score_keys", "choose", "score_tokens", "add_up")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Compiled:
    """Stands for a kernel: compiles it for what it is called with, instead of launching it."""

    def __init__(self, kernel: Any, capability: int) -> None:
        self.kernel = kernel
        self.capability = capability

    def __getitem__(self, grid: tuple[int, ...]) -> Compiled:
        return self

    def __call__(self, *args: Any, **constants: Any) -> None:
        """As Triton does: None and 1 are constants, and it is told what is a multiple of 16."""
        values = dict(zip(self.kernel.arg_names, args, strict=False)) | constants
        is_one = {name for name, value in values.items() if type(value) is int and value == 1 and name != "width"}
        fixed = {name: value for name, value in values.items() if name in {*constants, *is_one} or value is None}
        signature = {name: "constexpr" if name in fixed else mangle_type(value) for name, value in values.items()}
        even = {
            (place,): [["tt.divisibility", 16]]
            for place, (name, value) in enumerate(values.items())
            if name not in fixed and (value if isinstance(value, int) else value.data_ptr()) % 16 == 0
        }
        source = ASTSource(self.kernel, signature, fixed, even)
        self.report(triton.compile(source, target=GPUTarget("cuda", self.capability, 32)), fixed)

    def report(self, compiled: Any, fixed: dict[str, Any]) -> None:
        """Print what the machine code takes."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [str(CUOBJDUMP), "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", usage)}
        found = {
            "kernel": self.kernel.__name__,
            "capability": self.capability,
            "constants": {name: str(value) for name, value in fixed.items()},
            "registers": numbers["REG"],
            "stack_bytes": numbers["STACK"],
            "shared_bytes": compiled.metadata.shared,
        }
        print(json.dumps(found))


def attend(dtype: torch.dtype, dim: int, num_heads: int, num_queries: int, positions: bool) -> None:
    """A batch of one search, as it would be launched."""
    arena = Arena(dim, 32, dtype, torch.device("cpu"), Budget(16 << 20))
    search = Search(torch.zeros(8, dim), torch.tensor(arena.allocate(8)), 0, 0, 8 * 32, num_queries, 8)
    heads = torch.zeros(num_queries, num_heads, dim)
    table = torch.zeros(32, dim) if positions else None
    TritonKernel(arena.device).attend(Batch(View(arena, table, [search]), heads[:, 0], heads))


CASES: tuple[tuple[int, torch.dtype, int, int, int, bool], ...] = (
    (90, torch.bfloat16, 512, 16, 1, True),
    (90, torch.float32, 512, 8, 17, True),
    (80, torch.float16, 67, 1, 1, False),  # the built-in model's one head; a D that allows no wide loads
)
"""Capabilities, and batches."""


def main() -> None:
    kernels = {name: getattr(triton_loops, name) for name in KERNELS}
    for capability, dtype, dim, num_heads, num_queries, positions in CASES:
        for name, kernel in kernels.items():
            setattr(triton_loops, name, Compiled(kernel, capability))
        attend(dtype, dim, num_heads, num_queries, positions)


if __name__ == "__main__":
    main()
