"""A corpus that every machine has: docstrings and comments of Python's standard library, cut into passages.

The modules are read as text and parsed, never imported. Does not know embeddings or sessions.
"""

from __future__ import annotations

import ast
import io
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

MIN_WORDS, MAX_WORDS = 60, 120
"""Of a passage. The last of a module may have half of MIN_WORDS; what is shorter joins the passage before it."""
SKIPPED = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Passage:
    """Words of consecutive docstrings and comments of one module: where they begin and what they say."""

    module: str
    name: str
    """The class or function whose docstring it begins in, or "" for the module's and for a comment."""
    line: int
    text: str

    @property
    def package(self) -> str:
        """The first part of the module's name: questions name modules by it."""
        return self.module.partition(".")[0]

    @property
    def context(self) -> str:
        """Where it is from, in words: `zipfile.ZipFile.open` as "zipfile ZipFile open"."""
        return re.sub(r"[._]+", " ", f"{self.module} {self.name}").strip()

    @property
    def embedded_text(self) -> str:
        """What is embedded: the context, twice because it says more than any other words, and the text."""
        return f"{self.context} {self.context} {self.text}"


def read_corpus(root: Path | None = None, limit: int | None = None) -> list[Passage]:
    """All passages below `root` (the running interpreter's library), module by module in the order of names."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    passages: list[Passage] = []
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        if SKIPPED & set(path.relative_to(root).parts) or path.stat().st_size > MAX_FILE_BYTES:
            continue
        for passage in _cut(_module(path.relative_to(root)), _texts(path)):
            if passage.text not in seen:
                seen.add(passage.text)
                passages.append(passage)
        if limit is not None and len(passages) >= limit:
            return passages[:limit]
    return passages


def _module(path: Path) -> str:
    parts = list(path.with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _texts(path: Path) -> list[tuple[int, str, str]]:
    """Line, name and text of the docstrings and comments of one file, in the order of their lines."""
    try:
        source = path.read_text("utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a doubtful escape in somebody's file is not our user's concern
            tree = ast.parse(source)
    except (UnicodeDecodeError, SyntaxError):  # files that are broken on purpose
        return []
    return sorted([*_docstrings(tree), *_comments(source)])


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    waiting: list[tuple[ast.AST, str]] = [(tree, "")]
    while waiting:
        node, name = waiting.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield getattr(node, "lineno", 1), name, text
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                waiting.append((child, f"{name}.{child.name}".lstrip(".")))
            elif isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):  # no definition is in an expression
                waiting.append((child, name))


def _comments(source: str) -> Iterator[tuple[int, str, str]]:
    """Comments of their own lines, consecutive ones as one text."""
    run: list[str] = []
    first, last = 0, -2
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or token.line[: token.start[1]].strip():
            continue
        if token.start[0] != last + 1 and run:
            yield first, "", "\n".join(run)
            run = []
        if not run:
            first = token.start[0]
        run.append(token.string.lstrip("#! "))
        last = token.start[0]
    if run:
        yield first, "", "\n".join(run)


def _cut(module: str, texts: Sequence[tuple[int, str, str]]) -> list[Passage]:
    """The texts of a module as passages, cut between paragraphs where possible.

    Most docstrings are one line: alone they say too little to be found and are too unlike their neighbours for a
    summary key, so short texts are joined with what follows, each under its name.
    """
    passages: list[Passage] = []
    words: list[str] = []
    line, name = 0, ""
    for at, owner, text in texts:
        if words and owner:
            words.append(f"{owner.rpartition('.')[2]}:")
        for paragraph in re.split(r"\n\s*\n", text):
            if not words:
                line, name = at, owner
            words += paragraph.split()
            while len(words) > MAX_WORDS:
                passages.append(Passage(module, name, line, " ".join(words[:MAX_WORDS])))
                words, line, name = words[MAX_WORDS:], at, owner
            if len(words) >= MIN_WORDS:
                passages.append(Passage(module, name, line, " ".join(words)))
                words = []
    if len(words) >= MIN_WORDS // 2:
        passages.append(Passage(module, name, line, " ".join(words)))
    elif words and passages:
        passages[-1] = replace(passages[-1], text=" ".join([passages[-1].text, *words]))
    return passages
