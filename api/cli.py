"""The command line: `htm-service serve`, `keys`, `export`, `verify` and so on. Failures: a sentence, exit code 1.

Does not know: how anything is done. What is slow to import is imported by the command that needs it.
"""

from __future__ import annotations

import functools
import inspect
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from api.commands import keys as key_commands
from api.commands import models as model_commands
from api.commands import transfers as transfer_commands
from api.settings import Settings, env_name, flag_name, hide_key, sentence
from htm_service.errors import HTMError
from htm_service.version import __version__
from storage.base import StoreError


class Source(StrEnum):
    """Whose weights `models convert` reads."""

    HTM_PYTORCH = "htm-pytorch"
    HTM_PYTORCH_BLOCK = "htm-pytorch-block"
    HAIKU = "haiku"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `htm-service` and of `python -m api`; `arguments` are the command line's by default."""
    if arguments is None:
        hide_key()
    build()(arguments)


def build() -> typer.Typer:
    """The commands."""
    app = typer.Typer(
        name="htm-service",
        help="A memory server for agents: Hierarchical Transformer Memory attention over REST.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(top)
    app.command()(with_settings_flags(serve))
    app.command()(verify)
    app.command()(backup)
    app.command()(repair)
    app.command("export")(failing_clearly(transfer_commands.export_all))
    app.command("import")(failing_clearly(transfer_commands.import_all))
    keys = typer.Typer(help="Keys of those who may call a running server.", no_args_is_help=True)
    keys.command("create")(failing_clearly(key_commands.create))
    keys.command("list")(failing_clearly(key_commands.list_keys))
    keys.command("revoke")(failing_clearly(key_commands.revoke))
    app.add_typer(keys, name="keys")
    models = typer.Typer(help="Models of a running server, and their files.", no_args_is_help=True)
    models.command("convert")(convert)
    models.command("put")(failing_clearly(model_commands.put))
    models.command("list")(failing_clearly(model_commands.list_models))
    models.command("remove")(failing_clearly(model_commands.remove))
    app.add_typer(models, name="models")
    return app


def print_version(wanted: bool) -> None:
    """Print the version and stop, when asked to."""
    if wanted:
        print(f"htm-service {__version__}")
        raise typer.Exit


def top(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=print_version)
    ] = False,
) -> None:
    """A memory server for agents: Hierarchical Transformer Memory attention over REST."""


@contextmanager
def clear_failure() -> Iterator[None]:
    """Turns what a user can cause into one sentence on stderr and exit code 1; a bug keeps its traceback."""
    try:
        yield
    except ValidationError as error:
        message = sentence(error)
    except HTMError as error:
        message = error.detail
    except StoreError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    else:
        return
    print(f"htm-service: {message}", file=sys.stderr)
    raise typer.Exit(1)


def failing_clearly(command: Callable[..., None]) -> Callable[..., None]:
    """The command, whose failures are sentences."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        with clear_failure():
            command(*arguments, **options)

    return run


def with_settings_flags(command: Any) -> Any:
    """Gives `command` a flag for every setting, so that flags, HTM_* variables and settings cannot differ."""
    parameters = []
    for name, field in Settings.model_fields.items():
        flag = flag_name(name, field)
        kind: Any = str
        if field.annotation is bool:
            kind, flag = bool, f"{flag}/--no-{flag.removeprefix('--')}"
        text = f"{field.description} ({env_name(name, field)}"
        if field.default_factory is None and field.default is not None:
            text += f", default {field.default}"
        option = typer.Option(flag, help=f"{text})", show_default=False, metavar=None if kind is bool else "VALUE")
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[kind | None, option],
            )
        )
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def serve(**flags: Any) -> None:
    """Serve until SIGTERM, SIGHUP or SIGINT. Each flag has its HTM_* variable; a flag wins over the variable."""
    with clear_failure():
        settings = Settings(**{name: value for name, value in flags.items() if value is not None})
        from api.serving import serve as serve_app

        serve_app(settings)


def convert(
    src: Annotated[Path, typer.Argument(metavar="IN", help="`.pt`, `.safetensors` or, for haiku, `.npz`.")],
    dst: Annotated[Path, typer.Argument(metavar="OUT", help="The model file, NAME.safetensors.")],
    source: Annotated[Source, typer.Option("--from", help="Whose weights they are.")],
    heads: Annotated[int, typer.Option(help="Heads.", min=1)],
    dim_head: Annotated[int | None, typer.Option(help="Width per head.", min=1)] = None,
    top_k: Annotated[int | None, typer.Option(help="Chunks to attend to.", min=1)] = None,
    chunk_size: Annotated[int | None, typer.Option(help="Tokens per chunk.", min=1)] = None,
    layer: Annotated[
        str | None, typer.Option(help="Of several layers of haiku parameters, the one of this path, or end of it.")
    ] = None,
    no_position_encoding: Annotated[
        bool, typer.Option("--no-position-encoding", help="The model adds no positions to the tokens.")
    ] = False,
) -> None:
    """Make a model file of other people's weights; of several layers NAME-0, NAME-1, ..., unless --layer names one."""
    with clear_failure():
        if not src.is_file():
            raise OSError(f"{src} is not a file")
        from htm_service.attention.convert import convert_file

        given: dict[str, Any] = {}
        if top_k is not None:
            given["top_k"] = top_k
        if chunk_size is not None:
            given["chunk_size"] = chunk_size
        if no_position_encoding:
            given["position_encoding"] = False
        made = convert_file(src, dst, source=source.value, heads=heads, dim_head=dim_head, layer=layer, **given)
        for path, info in made.items():
            print(f"{path}: model {info.name}, width {info.dim}, {info.heads} heads, hash {info.hash}")


Where = Annotated[str, typer.Argument(help="A data directory, a database file, or the URL of a store.")]


def verify(where: Where) -> None:
    """Read everything in a store and compare checksums; changes nothing. Exit code 1 for problems."""
    with clear_failure():
        check_exists(where)
        num_problems = report(where)
    if num_problems:
        raise typer.Exit(1)


def backup(
    directory: Annotated[Path, typer.Argument(help="A data directory, or a SQLite file.")],
    target: Annotated[Path, typer.Argument(metavar="DEST", help="A new data directory; a server can start on it.")],
) -> None:
    """Copy the data of a running server, or of a stopped one, and verify the copy. Exit code 1 for problems."""
    with clear_failure():
        check_exists(directory)
        from storage.resolve import back_up

        back_up(directory, target)
        if (directory / "models").is_dir():
            shutil.copytree(directory / "models", target / "models", dirs_exist_ok=True)
        num_problems = report(target)
    if num_problems:
        raise typer.Exit(1)


def repair(
    where: Where,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before anything is written.")] = False,
) -> None:
    """Keep what can be read of damaged sessions; says first what is lost. The server must be stopped."""
    with clear_failure():
        check_exists(where)
        from htm_service.session_settings import wrong_with
        from storage.resolve import open_for_repair

        with closing(open_for_repair(where)) as store:
            repairs = store.plan_repair(wrong_with)
            for item in repairs:
                print(item)
            if repairs and not yes:
                typer.confirm("Is this to be written?", abort=True)
            store.carry_out_repair(repairs)
        num_problems = report(where)
    if num_problems:
        raise typer.Exit(1)


def check_exists(where: Path | str) -> None:
    """Raise OSError for a path with nothing there; what is none is the store's to refuse, without a password."""
    if ":" not in str(where) and not Path(where).exists():
        raise OSError(f"{where} does not exist")


def report(where: Path | str) -> int:
    """Print what is wrong with the data, then what there is; how many problems."""
    from htm_service.session_settings import wrong_with
    from storage.resolve import open_readonly

    num_problems = 0
    with closing(open_readonly(where)) as store:
        for problem in store.verify(wrong_with):
            num_problems += 1
            place = "the store" if problem.session is None else f"session {problem.session}"
            print(f"{place}: {problem.message}")
        totals = store.totals()
    print(f"{totals.num_sessions} sessions, {totals.num_tokens} tokens, {num_problems} problems")
    return num_problems
