"""The corpus: what is read of a file, how it is cut, and that reading runs nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import pytest

from examples.demo.corpus import MAX_WORDS, MIN_WORDS, SKIPPED, Passage, read_corpus


def words(prefix: str, count: int) -> str:
    return " ".join(f"{prefix}{number}" for number in range(count))


def write(root: Path, name: str, source: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, "utf-8")


def test_docstrings_and_comments_in_the_order_of_lines(tmp_path: Path) -> None:
    write(
        tmp_path,
        "pkg/mod.py",
        f'''"""{words("m", 60)}"""

# {words("c", 30)}
#! {words("d", 30)}
x = 1  # beside code: not a text
s = """
# in a string: not a comment
"""

class A:
    def f(self):
        """{words("f", 60)}"""
        if True:
            async def g():
                """{words("g", 61)}"""
''',
    )
    found = [(p.module, p.name, p.line, p.text) for p in read_corpus(tmp_path)]
    assert found == [
        ("pkg.mod", "", 1, words("m", 60)),
        ("pkg.mod", "", 3, f"{words('c', 30)} {words('d', 30)}"),
        ("pkg.mod", "A.f", 11, words("f", 60)),
        ("pkg.mod", "A.f.g", 14, words("g", 61)),
    ]


def test_short_texts_are_joined_under_their_names(tmp_path: Path) -> None:
    write(
        tmp_path,
        "mod.py",
        f'''"""{words("m", 40)}"""
def f():
    """{words("f", 30)}"""
class A:
    def g(self):
        """{words("g", 35)}"""
''',
    )
    first, second = read_corpus(tmp_path)
    assert first == Passage("mod", "", 1, f"{words('m', 40)} f: {words('f', 30)}")
    assert second == Passage("mod", "A.g", 5, words("g", 35))
    assert second.context == "mod A g"


def test_a_short_end_joins_the_passage_before(tmp_path: Path) -> None:
    write(tmp_path, "mod.py", f'"""{words("m", 60)}\n\n{words("end", 29)}"""')
    (passage,) = read_corpus(tmp_path)
    assert passage.text == f"{words('m', 60)} {words('end', 29)}"


def test_a_module_that_says_nearly_nothing_has_no_passage(tmp_path: Path) -> None:
    write(tmp_path, "mod.py", f'"""{words("m", MIN_WORDS // 2 - 1)}"""')
    assert read_corpus(tmp_path) == []


def test_long_texts_are_cut_between_paragraphs_or_at_the_most_words(tmp_path: Path) -> None:
    write(tmp_path, "mod.py", f'"""{words("a", 70)}\n\n{words("b", 2 * MAX_WORDS + 65)}"""')
    texts = [passage.text for passage in read_corpus(tmp_path)]
    assert [len(text.split()) for text in texts] == [70, MAX_WORDS, MAX_WORDS, 65]
    assert " ".join(texts) == f"{words('a', 70)} {words('b', 2 * MAX_WORDS + 65)}"


def test_nothing_is_imported_and_broken_or_skipped_files_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, "a_bomb.py", f'"""{words("m", 60)}"""\nraise SystemExit("imported")')
    write(tmp_path, "broken.py", "def :")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    for folder in SKIPPED:
        write(tmp_path, f"{folder}/mod.py", f'"""{words(folder, 60)}"""')
    write(tmp_path, "pkg/__init__.py", f'"""{words("p", 60)}"""')
    write(tmp_path, "same.py", f'"""{words("p", 60)}"""')
    assert [passage.module for passage in read_corpus(tmp_path)] == ["a_bomb", "pkg"]


def test_a_doubtful_escape_is_no_warning(tmp_path: Path) -> None:
    write(tmp_path, "mod.py", f'"""{words("m", 60)}"""\nx = "\\d"')
    assert len(read_corpus(tmp_path)) == 1


@pytest.mark.parametrize("limit", [1, 300])
def test_a_limit_is_a_prefix_and_reading_is_deterministic(passages: Sequence[Passage], limit: int) -> None:
    before = set(sys.modules)
    assert read_corpus(limit=limit) == passages[:limit]
    assert set(sys.modules) == before


def test_the_library_of_this_interpreter(passages: Sequence[Passage]) -> None:
    assert len(passages) > 3000
    sizes = [len(passage.text.split()) for passage in passages]
    assert min(sizes) >= MIN_WORDS // 2
    assert max(sizes) < MAX_WORDS + MIN_WORDS // 2
    assert len({passage.text for passage in passages}) == len(passages)
    modules = [module for module, _ in groupby(passages, key=lambda passage: passage.module)]
    assert len(modules) == len(set(modules)), "the passages of a module are not together"
    assert not SKIPPED & {part for module in modules for part in module.split(".")}
