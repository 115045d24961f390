"""Triton's interpreter, made quick enough for tests; imported where Triton's kernels are tested without a GPU.

It runs every program of a launch in Python, one after the other. Two of its habits cost most of the time: it reduces
by xor (a step of `tl.topk`) number by number, and looks through all of `triton.language` at each call of a function.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels are interpreted in this process: set by `conftest.py`, before triton is imported."""


def quicken() -> None:
    """Replace both; answers stay the same."""
    number_by_number = interpreter.ReduceOps.generic_reduce

    def reduce(self: Any, input: Any) -> Any:
        if self.combine_fn is not tl.standard._xor_combine:
            return number_by_number(self, input)
        found = np.bitwise_xor.reduce(input[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(found, input[0].dtype)

    interpreter.ReduceOps.generic_reduce = reduce
    interpreter._patch_lang(tl.topk.fn)  # stays in force, as after any call of it; a launch patches what kernels see
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **named: self.rewrite()(*args, **named)


if INTERPRETED:
    quicken()
