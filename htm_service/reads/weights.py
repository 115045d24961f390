"""Which model a request is computed with, and how many chunks it takes: a name until its first batch is formed.

Does not know: batches, queues, where models come from.
"""

from __future__ import annotations

from htm_service.attention.model import Model
from htm_service.attention.registry import Served
from htm_service.errors import InvalidArgument
from htm_service.sessions.validation import check_model_dim


class Outgrown(InvalidArgument):
    """The model was replaced by one that takes more chunks than the request was admitted for."""


class Weights:
    """What the name of a model stands for when the first batch of a request is formed, and from then on the same.

    Made by the loop with the `model` of that moment, by which the request is admitted; the device thread's afterwards.
    All parts of a request share it, so that one answer is of one model. `asked` is the request's own `top_k`.
    """

    __slots__ = ("_asked", "_dim", "_is_bound", "_name", "_namespace", "model", "top_k")

    def __init__(self, namespace: str, name: str, dim: int, model: Model, asked: int | None) -> None:
        self.model = model
        self.top_k = asked or model.config.top_k
        self._namespace = namespace
        self._name = name
        self._dim = dim
        self._asked = asked
        self._is_bound = False

    @classmethod
    def fixed(cls, model: Model, top_k: int) -> Weights:
        """Those of a model that has no name."""
        weights = cls("", "", 0, model, top_k)
        weights._is_bound = True
        return weights

    def bind(self, served: Served) -> None:
        """Take what the name stands for now; where that is nothing, the model is the one that was there before.

        Raises InvalidArgument when it does not fit the session any more, and Outgrown.
        """
        if self._is_bound:
            return
        model = served.find(self._namespace, self._name) or self.model
        if model is not self.model:
            check_model_dim(self._name, model, self._dim)
            top_k = self._asked or model.config.top_k
            if top_k > self.top_k:
                raise Outgrown(f"model {self._name!r} takes {top_k} chunks now, it took {self.top_k}")
            self.model, self.top_k = model, top_k
        self._is_bound = True
