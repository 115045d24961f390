"""Random model files for tests of the serving path."""

from collections.abc import Mapping
from pathlib import Path

import torch

from htm_service.attention.convert import from_module
from htm_service.attention.model_config import ModelConfig
from htm_service.attention.model_file import save_model
from htm_service.attention.modules import HTMAttention, HTMBlock

Weights = Mapping[str, torch.Tensor]


def write_model(
    path: Path, *, dim: int, heads: int, dim_head: int, block: bool = False, seed: int = 0, add_pos_enc: bool = True
) -> tuple[ModelConfig, Weights]:
    """A model of random weights as a file, and its config and tensors."""
    torch.manual_seed(seed)
    kind = HTMBlock if block else HTMAttention
    module = kind(dim, heads=heads, dim_head=dim_head, topk_mems=3, mem_chunk_size=5, add_pos_enc=add_pos_enc)
    config, tensors = from_module(module)
    save_model(path, config, tensors)
    return config, tensors
