"""The names that models are served under: at one moment, and from one moment to the next.

Owns: which names there are, and which of them cannot be served, with the reason. Does not know: what is in a model's
file, how a model is computed, where models that were put are kept (`catalog.py`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from htm_service.attention.model import Model, RetrievalModel
from htm_service.attention.model_file import load_model
from htm_service.config import NAME_PATTERN
from htm_service.errors import HTMError, InvalidArgument, ModelNotFound, quoted
from htm_service.records import SHARED_NAMESPACE, ModelInfo, ModelSource

RETRIEVAL = "retrieval"

_NAME = re.compile(NAME_PATTERN)


Name = tuple[str, str]
"""A namespace, and a model's name within it."""


@dataclass(frozen=True, slots=True)
class Served:
    """Which model each name stands for at one moment. Nothing in it changes, so any thread may look."""

    everyones: Mapping[str, Model]
    put: Mapping[Name, Model | None]
    """None where the weights are not here, or cannot be read; they hide the shared ones of that name all the same."""

    def find(self, namespace: str, name: str) -> Model | None:
        """What a name stands for in a namespace: everyone's, which nobody can put, its own, or the shared one."""
        if (model := self.everyones.get(name)) is not None:
            return model
        own = namespace, name
        return self.put[own] if own in self.put else self.put.get((SHARED_NAMESPACE, name))


class ModelRegistry:
    """The names models are served under: `retrieval`, NAME for each NAME.safetensors of a directory, and what was put.

    Changed by the event loop alone; a change is a new `served`. The directory is read once, hidden files are not. A
    file that cannot be served stops nobody: it is listed with what is wrong with it, and logged. Raises InvalidArgument
    when the directory does not exist.
    """

    def __init__(
        self,
        models_dir: Path | None = None,
        device: torch.device | str = "cpu",
        retrieval: RetrievalModel | None = None,
    ) -> None:
        self._models: dict[str, Model] = {RETRIEVAL: (retrieval or RetrievalModel()).to(device)}
        self.served = Served(self._models, {})
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

    def is_everyones(self, name: str) -> bool:
        """Whether a name is the built-in model's or a file's, served or not: no other model can have it."""
        return name in self._models or name in self._errors

    def put(self, name: Name, model: Model | None) -> None:
        """Have a name stand for these weights from the next batch on; for none, where they are not here."""
        self.served = replace(self.served, put={**self.served.put, name: model})

    def drop(self, name: Name) -> None:
        """Have a name stand for nothing that was put."""
        self.served = replace(self.served, put={other: its for other, its in self.served.put.items() if other != name})

    def missing(self, namespace: str, name: str) -> HTMError:
        """Why everyone's models hold none of this name: it is no name, its file is not served, or there is none.

        That says which ones the namespace can name.
        """
        if not is_name(name):
            return InvalidArgument(
                f"model is {quoted(name)}, a model's name must match {_NAME.pattern}, and not be a dot"
            )
        if (error := self._errors.get(name)) is not None:
            return ModelNotFound(f"model {name!r} cannot be served: {error}", model=name)
        put = {its for space, its in self.served.put if space in (namespace, SHARED_NAMESPACE)}
        names = ", ".join(sorted(put | self._models.keys()))
        return ModelNotFound(f"no model is named {name!r}; there are: {names}", model=name)

    def infos(self) -> list[ModelInfo]:
        """The built-in model and those of files, by name, those that cannot be served too."""
        sources: dict[str, ModelSource] = {RETRIEVAL: "built-in"}
        served = [model.info(name, sources.get(name, "file")) for name, model in self._models.items()]
        broken = [ModelInfo(name=name, error=error) for name, error in self._errors.items()]
        return sorted((*served, *broken), key=lambda info: info.name)


def is_name(name: str) -> bool:
    """Whether this can be a model's name: it is a part of a path too, so neither `.` nor `..` is one."""
    return bool(_NAME.fullmatch(name)) and name not in {".", ".."}


def _load(path: Path, device: torch.device | str) -> Model:
    """The model in a file, if its name can be a model's. Raises InvalidArgument."""
    if path.stem == RETRIEVAL:
        raise InvalidArgument(f"the name {RETRIEVAL!r} belongs to the built-in model")
    if not _NAME.fullmatch(path.stem):
        raise InvalidArgument(f"a model's name must match {_NAME.pattern}")
    if not path.is_file():  # a pipe would be waited for
        raise InvalidArgument("it is not a file")
    return load_model(path, device)
