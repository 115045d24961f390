"""Imports flow one way, between the packages and downward through the folders of each. Files are parsed, never run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("api", "htm_service", "storage", "client/htm_client")
OWN = {"api", "htm_service", "storage", "htm_client", "tests", "bench"}

ALLOWED = {
    "api": {"htm_service"},
    "htm_service": {"storage"},
    "storage": set[str](),
    "htm_client": set[str](),
}
EXCEPTIONS = {
    ("api/app.py", "storage"),  # the composition root opens the store
    ("api/cli.py", "storage"),  # `verify`, `backup` and `repair` need no engine; a store's errors become one sentence
    ("client/htm_client/in_process.py", "api"),  # `:memory:`, imported when it is asked for
}
"""Edges beyond ALLOWED, by file; each must be in use."""

ROOMS = {
    "api": (
        ("cli", "__main__"),
        ("commands",),
        ("serving",),
        ("app",),
        ("routes", "middleware", "protocol"),
        ("openapi",),
        ("schemas",),
        ("wire", "disconnect", "auth", "tracing"),
        ("settings", "errors", "machine", "logs", "metrics"),
    ),
    "storage": (("resolve",), ("databases",), ("sql", "in_memory"), ("base", "migrations")),
    "htm_service": (
        ("engine", "inspection", "batches"),
        ("transfers",),
        ("writes",),
        ("reads",),
        ("sessions",),
        ("attention",),
        ("kernels",),
        ("memory",),
        ("threads",),
        (
            "records",
            "errors",
            "store_errors",
            "config",
            "metrics",
            "clock",
            "dtypes",
            "version",
            "session_settings",
            "cursors",
        ),
    ),
}
"""The folders of a package, and the modules at its root, from the top: each may import what stands below it."""

MAX_MODULES = 8
"""In one folder."""

AT_IMPORT = {
    "re.compile", "frozenset", "set", "dict", "tuple", "list", "range", "sorted", "enumerate",
    "np.dtype", "bindparam", "delete", "exists", "func.coalesce", "func.max", "insert", "or_", "select", "update",
    "tl.constexpr", "triton.jit",  # in kernels/triton_loops.py: nothing is compiled before it is launched
    "threading.Lock",  # in storage/sql/schema.py: what it guards is a global of Alembic
}  # fmt: skip
"""Functions that modules may call when they are imported: they make constants and touch nothing outside the module."""

LIVING = {"FastAPI", "Starlette", "APIRouter", "Typer", "Settings", "Engine", "Thread", "Lock", "Event", "Client"}
"""Classes whose instances are no values, so that no module may hold one; other classes' instances may be constants."""

RUN_BY_ALEMBIC = "storage/migrations/env.py"
"""The one module that is there to be executed."""

TREES: dict[str, ast.Module] = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(), str(path))
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every module that a file imports anywhere, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            yield node.module or "", node.lineno


def run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of a module that run when it is imported: not the bodies of functions, not annotations."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        parts: list[ast.AST] = [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]
    elif isinstance(node, ast.Lambda):
        parts = []
    elif isinstance(node, ast.AnnAssign):
        parts = [] if node.value is None else [node.value]
    elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
        parts = list(node.orelse)
    else:
        parts = list(ast.iter_child_nodes(node))
    for part in parts:
        yield part
        yield from run_at_import(part)


def package(file: str) -> str:
    return file.removeprefix("client/").split("/")[0]


def test_files_were_found() -> None:
    assert {package(file) for file in TREES} == set(ALLOWED)


def test_imports_flow_one_way() -> None:
    wrong, used = [], set()
    for file, tree in TREES.items():
        here = package(file)
        for name, line in imports(tree):
            top = name.split(".")[0]
            if top == here or top not in OWN or top in ALLOWED[here]:
                continue
            if (file, top) in EXCEPTIONS:
                used.add((file, top))
            else:
                wrong.append(f"{file}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)
    assert used == EXCEPTIONS, f"exceptions that nothing uses: {EXCEPTIONS - used}"


def room(package: str, module: str) -> int | None:
    """Which of ROOMS a dotted module name is in; None for the package itself."""
    _, *rest = module.split(".")
    if not rest:
        return None
    (found,) = (level for level, names in enumerate(ROOMS[package]) if rest[0] in names)
    return found


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_imports_go_downward_through_the_rooms(name: str) -> None:
    wrong = []
    for file, tree in TREES.items():
        if not file.startswith(f"{name}/") or file == f"{name}/__init__.py":
            continue
        here = room(name, file.removesuffix(".py").replace("/", "."))
        assert here is not None
        for module, line in imports(tree):
            if module.split(".")[0] == name and (there := room(name, module)) is not None and there < here:
                wrong.append(f"{file}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_folders_are_small() -> None:
    """A folder that one can take in; the roots, and the one of the SQL store, may have a few more."""
    folders: dict[str, int] = {}
    for file in TREES:
        path = Path(file)
        if path.name != "__init__.py" and len(path.parts) > 2 and not file.startswith("client/"):
            folders[path.parent.as_posix()] = folders.get(path.parent.as_posix(), 0) + 1
    large = {"storage/sql": 12, "storage/migrations/versions": 30}
    assert not {folder: num for folder, num in folders.items() if num > large.get(folder, MAX_MODULES)}


def test_constructors_take_at_most_two_callbacks() -> None:
    wrong = []
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                arguments = [*node.args.args, *node.args.kwonlyargs]
                annotations = [ast.unparse(one.annotation) for one in arguments if one.annotation is not None]
                if sum("Callable" in annotation for annotation in annotations) > 2:
                    wrong.append(f"{file}:{node.lineno}")
    assert not wrong, wrong


def test_the_client_imports_the_server_only_on_demand() -> None:
    for file, tree in TREES.items():
        if package(file) == "htm_client":
            at_import = [node for node in run_at_import(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
            known = {name.split(".")[0] for node in at_import for name, _ in imports(node)}
            assert known or file.endswith("__init__.py"), file
            assert not known & {"api", "htm_service", "storage"}, file


@pytest.mark.parametrize(
    ("folder", "modules"),
    [
        ("api/", {"torch", "einops", "sqlalchemy", "alembic"}),
        ("storage/", {"torch", "einops", "numpy", "fastapi", "starlette"}),
        ("htm_service/", {"sqlalchemy", "alembic", "fastapi", "starlette", "pydantic", "httpx"}),
        ("client/", {"torch", "fastapi", "starlette", "pydantic", "sqlalchemy", "safetensors", "orjson"}),
    ],
)
def test_what_a_layer_does_not_know(folder: str, modules: set[str]) -> None:
    for file, tree in TREES.items():
        if file.startswith(folder):
            known = {name.split(".")[0] for name, _ in imports(tree)}
            known -= {"torch"} if file == "client/htm_client/torch.py" else set()  # which is for those who have it
            assert not known & modules, f"{file} imports {known & modules}"


def test_the_environment_is_read_in_one_file() -> None:
    readers = {
        file
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "putenv"))
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and any("env" in a.name for a in node.names))
    }
    assert readers == {"api/settings.py"}


@pytest.mark.parametrize("file", sorted(TREES))
def test_every_module_says_what_it_owns(file: str) -> None:
    assert not TREES[file].body or ast.get_docstring(TREES[file]), f"{file} has no docstring"


@pytest.mark.parametrize("file", sorted(TREES.keys() - {RUN_BY_ALEMBIC}))
def test_no_work_at_import(file: str) -> None:
    """No device probing, settings, loggers or app objects at module level: constants and types only."""
    calls = [
        f"{file}:{node.lineno} {ast.unparse(node.func)}(...)"
        for statement in TREES[file].body
        if not isinstance(statement, ast.ClassDef)  # fields and decorators of classes declare
        for node in [statement, *run_at_import(statement)]
        if isinstance(node, ast.Call) and not makes_a_constant(node)
    ]
    assert not calls, "\n".join(calls)


def makes_a_constant(call: ast.Call) -> bool:
    function = ast.unparse(call.func)
    if isinstance(call.func, ast.Attribute) and not isinstance(call.func.value, ast.Name):
        return True  # a method of a value made on the spot, such as `"a b".split()`; that value is looked at itself
    name = function.rpartition(".")[2]
    return function in AT_IMPORT or (name[0].isupper() and name not in LIVING) or name in ("items", "split", "values")


def handlers(tree: ast.Module) -> Iterator[ast.AsyncFunctionDef]:
    """The handlers of a module of routes: what takes a request and is no helper of another one."""
    for node in tree.body:
        if isinstance(node, ast.AsyncFunctionDef) and any(arg.arg == "request" for arg in node.args.args):
            yield node


def engine_calls(function: ast.AST) -> int:
    """How often a function asks the engine for something: uses of `engine_of(request)` or of what it was kept as."""
    kept = {
        target.id
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and "engine_of(" in ast.unparse(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    asked = [
        node
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and (
            (isinstance(node.func.value, ast.Call) and ast.unparse(node.func.value).startswith("engine_of("))
            or (isinstance(node.func.value, ast.Name) and node.func.value.id in kept)
        )
    ]
    return len(asked)


ENGINE_FREE = {"_while_known", "memories", "parse", "to_ui"}
"""Functions of routes that take a request and ask the engine for nothing: they pass it on, or read it."""


def test_a_handler_makes_one_engine_call() -> None:
    wrong = [
        f"{file}:{function.lineno} {function.name} makes {engine_calls(function)} calls"
        for file, tree in TREES.items()
        if file.startswith("api/routes/")
        for function in handlers(tree)
        if function.name not in ENGINE_FREE and engine_calls(function) != 1
    ]
    assert not wrong, "\n".join(wrong)


OTHERS = {"interpreter._patch_lang", "tl.standard._xor_combine"}
"""Private names of other projects that have no public twin, in tests/kernels/interpreter.py."""


@pytest.mark.parametrize("folder", ["tests", "client/tests", "bench"])
def test_tests_enter_by_public_names(folder: str) -> None:
    """So that rooms can be moved. A named tuple's `_replace` is public; two underscores are Python's."""
    wrong = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("_"):
                names = [alias.name for alias in node.names]
            else:
                continue
            private = [name for name in names if name.startswith("_") and not name.startswith("__")]
            if private and private != ["_replace"] and ast.unparse(node) not in OTHERS:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {private}")
    assert not wrong, "\n".join(wrong)


def test_no_drawers() -> None:
    drawers = {"utils.py", "util.py", "common.py", "helpers.py", "misc.py"}
    assert not [file for file in TREES if Path(file).name in drawers or "manager" in Path(file).name]
