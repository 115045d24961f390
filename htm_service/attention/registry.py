"""The names that models are served under.

Owns: which names there are. Does not know: what is in a model's file, how a model is computed.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from htm_service.attention.model import Model, RetrievalModel
from htm_service.attention.model_file import load_model
from htm_service.errors import InvalidArgument, ModelNotFound
from htm_service.records import ModelInfo

RETRIEVAL = "retrieval"

_NAME = re.compile(r"[A-Za-z0-9._~-]{1,128}")


class ModelRegistry:
    """The names models are served under: `retrieval`, and NAME for each NAME.safetensors of a directory.

    The directory is read once. Raises InvalidArgument when it does not exist or a file in it is bad, and
    when a file would take the name of the built-in model.
    """

    def __init__(
        self,
        models_dir: Path | None = None,
        device: torch.device | str = "cpu",
        retrieval: RetrievalModel | None = None,
    ) -> None:
        self._models: dict[str, Model] = {RETRIEVAL: (retrieval or RetrievalModel()).to(device)}
        if models_dir is None:
            return
        if not models_dir.is_dir():
            raise InvalidArgument(f"models directory {models_dir} is not a directory")
        for path in sorted(models_dir.glob("*.safetensors")):
            if path.stem == RETRIEVAL:
                raise InvalidArgument(f"{path}: the name {RETRIEVAL!r} belongs to the built-in model")
            if not _NAME.fullmatch(path.stem):
                raise InvalidArgument(f"{path}: a model's name must match {_NAME.pattern}")
            self._models[path.stem] = load_model(path, device)

    def get(self, name: str) -> Model:
        """The model of this name. Raises ModelNotFound, which names those that exist."""
        try:
            return self._models[name]
        except KeyError:
            names = ", ".join(sorted(self._models))
            raise ModelNotFound(f"no model is named {name!r}; there are: {names}", model=name) from None

    def infos(self) -> list[ModelInfo]:
        """All models, by name."""
        return [self._models[name].info(name) for name in sorted(self._models)]
