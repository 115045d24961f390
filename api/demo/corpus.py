"""A corpus that every machine has: docstrings and comments of Python's standard library, cut into passages.

The modules are read as text and parsed, never imported. Does not know embeddings or sessions.
"""

from __future__ import annotations

import ast
import io
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MIN_WORDS, MAX_WORDS = 60, 120
"""Of a passage; the last of a text may have half as many as MIN_WORDS."""
SKIPPED = {
    "__pycache__",
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
    """Words of one docstring or comment: where it is from and what it says."""

    module: str
    name: str
    """The class or function it belongs to, or "" for the module itself."""
    line: int
    text: str

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
        for passage in _of_file(path, _module(path.relative_to(root))):
            if passage.text not in seen:
                seen.add(passage.text)
                passages.append(passage)
        if limit is not None and len(passages) >= limit:
            return passages[:limit]
    return passages


def _module(path: Path) -> str:
    parts = list(path.with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _of_file(path: Path, module: str) -> Iterator[Passage]:
    """The passages of one file in the order of their lines."""
    try:
        source = path.read_text("utf-8")
        tree = ast.parse(source)
    except (UnicodeDecodeError, SyntaxError):  # files that are broken on purpose
        return
    texts = [*_docstrings(tree), *_comments(source)]
    for line, name, text in sorted(texts):
        for part in _cut(text):
            yield Passage(module, name, line, part)


def _docstrings(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    def walk(node: ast.AST, names: tuple[str, ...]) -> Iterator[tuple[int, str, str]]:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if not isinstance(node, ast.Module):
                names = (*names, node.name)
            if text := ast.get_docstring(node):
                yield getattr(node, "lineno", 1), ".".join(names), text
        for child in ast.iter_child_nodes(node):
            yield from walk(child, names)

    return walk(tree, ())


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


def _cut(text: str) -> Iterator[str]:
    """Paragraphs, short ones joined and long ones cut, as passages of MIN_WORDS to MAX_WORDS words."""
    words: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        words += paragraph.split()
        while len(words) > MAX_WORDS:
            yield " ".join(words[:MAX_WORDS])
            words = words[MAX_WORDS:]
        if len(words) >= MIN_WORDS:
            yield " ".join(words)
            words = []
    if len(words) >= MIN_WORDS // 2:
        yield " ".join(words)
