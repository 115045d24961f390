"""`htm-service models put|list|remove`: they ask a running server, with the admin's key from the environment.

Does not know: how the server keeps models, and what is in a file.
"""

from __future__ import annotations

import urllib.parse
from pathlib import Path
from typing import Annotated, Any

import typer

from api.commands.remote import LOCAL, Url, ask

Name = Annotated[str, typer.Argument(help="What sessions and attends call the model.")]
Namespace = Annotated[str | None, typer.Option(help="Whose model it is, `shared` for all; default if left out.")]
IfMatch = Annotated[str | None, typer.Option(help="Only while the model has this hash.")]


def put(
    name: Name,
    file: Annotated[Path, typer.Argument(help="A model file, as `models convert` makes them.")],
    if_match: IfMatch = None,
    if_new: Annotated[bool, typer.Option("--if-new", help="Only when there is none of this name.")] = False,
    namespace: Namespace = None,
    url: Url = LOCAL,
) -> None:
    """Put a model, or replace it while attends go on."""
    headers = {"Content-Type": "application/x-safetensors", **_condition(if_match)}
    if if_new:
        headers["If-None-Match"] = "*"
    _print(ask(url, "PUT", _path(name), file.read_bytes(), namespace, headers))


def list_models(
    models_dir: Annotated[
        Path | None,
        typer.Option(help="A directory of model files: list what is in it, and ask nobody."),
    ] = None,
    namespace: Namespace = None,
    url: Url = LOCAL,
) -> None:
    """List the models that can be named, and those that cannot be served, with the reason."""
    if models_dir is None:
        for model in ask(url, "GET", "/v1/models", namespace=namespace)["models"]:
            _print(model)
        return
    from api.schemas.views import Model
    from htm_service.attention.registry import ModelRegistry

    for info in ModelRegistry(models_dir, "cpu").infos():
        _print(Model.of(info).model_dump())


def remove(name: Name, if_match: IfMatch = None, namespace: Namespace = None, url: Url = LOCAL) -> None:
    """Remove a model that no session names."""
    ask(url, "DELETE", _path(name), namespace=namespace, headers=_condition(if_match))


def _path(name: str) -> str:
    return f"/v1/models/{urllib.parse.quote(name, safe='')}"


def _condition(if_match: str | None) -> dict[str, str]:
    return {} if if_match is None else {"If-Match": f'"{if_match}"'}


def _print(model: dict[str, Any]) -> None:
    if model["error"] is not None:
        print(f"{model['name']}  cannot be served: {model['error']}")
        return
    config = model["config"]
    width = "any width" if config["dim"] is None else f"width {config['dim']}"
    shape = f"{config['heads']} heads, top_k {config['top_k']}, chunks of {config['chunk_size']}"
    print(f"{model['name']}  {width}, {shape}  {model['hash']}  {model['source']}, {model['num_sessions']} sessions")
