"""The names that models are served under.

Owns: which names there are, and which of them cannot be served, with the reason. Does not know: what is in a model's
file, how a model is computed.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch

from htm_service.attention.model import Model, RetrievalModel
from htm_service.attention.model_file import load_model
from htm_service.config import NAME_PATTERN
from htm_service.errors import InvalidArgument, ModelNotFound, quoted
from htm_service.records import ModelInfo

RETRIEVAL = "retrieval"

_NAME = re.compile(NAME_PATTERN)


class ModelRegistry:
    """The names models are served under: `retrieval`, and NAME for each NAME.safetensors of a directory.

    The directory is read once, hidden files are not. A file that cannot be served stops nobody: it is listed with what
    is wrong with it, and logged. Raises InvalidArgument when the directory does not exist.
    """

    def __init__(
        self,
        models_dir: Path | None = None,
        device: torch.device | str = "cpu",
        retrieval: RetrievalModel | None = None,
    ) -> None:
        self._models: dict[str, Model] = {RETRIEVAL: (retrieval or RetrievalModel()).to(device)}
        self._errors: dict[str, str] = {}
        """Why a file is not served, by the name it would have; by its own where that is none."""
        if models_dir is None:
            return
        if not models_dir.is_dir():
            raise InvalidArgument(f"models directory {models_dir} is not a directory")
        for path in sorted(models_dir.glob("*.safetensors")):
            if not path.name.startswith("."):  # such as macOS leaves beside what was copied
                self._add(path, device)

    def _add(self, path: Path, device: torch.device | str) -> None:
        """Serve a file under its name, or keep why not."""
        name = path.stem if path.stem != RETRIEVAL and _NAME.fullmatch(path.stem) else path.name
        try:
            self._models[name] = _load(path, device)
        except InvalidArgument as error:
            self._errors[name] = error.detail.removeprefix(f"{path}: ")
        except Exception as error:  # whatever else a file holds, or the device lacks
            self._errors[name] = f"it cannot be loaded: {error!r}"
        if name in self._errors:
            logging.getLogger(__name__).error("the model file %s is not served: %s", path, self._errors[name])

    def get(self, name: str) -> Model:
        """The model of this name. Raises InvalidArgument for what is no name, and ModelNotFound.

        That says why one cannot be served, or names those that are.
        """
        if (model := self._models.get(name)) is not None:
            return model
        if not _NAME.fullmatch(name):
            raise InvalidArgument(f"model is {quoted(name)}, a model's name must match {_NAME.pattern}")
        if (error := self._errors.get(name)) is not None:
            raise ModelNotFound(f"model {name!r} cannot be served: {error}", model=name)
        names = ", ".join(sorted(self._models))
        raise ModelNotFound(f"no model is named {name!r}; there are: {names}", model=name)

    def infos(self) -> list[ModelInfo]:
        """All models, by name, those that cannot be served too."""
        served = [model.info(name) for name, model in self._models.items()]
        broken = [ModelInfo(name=name, error=error) for name, error in self._errors.items()]
        return sorted((*served, *broken), key=lambda info: info.name)


def _load(path: Path, device: torch.device | str) -> Model:
    """The model in a file, if its name can be a model's. Raises InvalidArgument."""
    if path.stem == RETRIEVAL:
        raise InvalidArgument(f"the name {RETRIEVAL!r} belongs to the built-in model")
    if not _NAME.fullmatch(path.stem):
        raise InvalidArgument(f"a model's name must match {_NAME.pattern}")
    if not path.is_file():  # a pipe would be waited for
        raise InvalidArgument("it is not a file")
    return load_model(path, device)
