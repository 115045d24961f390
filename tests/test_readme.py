"""The README: its examples run against a real server, its links lead somewhere, its folders are what git tracks."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


def block(language: str, start: str) -> str:
    """The one block of that language whose text begins so."""
    (found,) = re.findall(rf"^```{language}\n({re.escape(start)}.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert isinstance(found, str)
    return found


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server of its own process, as `htm-service serve` starts it."""
    command = [sys.executable, "-m", "api", "serve", "--port", "0", "--store-url", "memory://", "--log-level", "error"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().split()[-1]
        server.terminate()
        assert server.wait(20) == 0


def test_python_example(address: str) -> None:
    code = block("python", "from htm_client")
    assert (ROOT / "examples" / "quickstart.py").read_text().endswith(code), "examples/quickstart.py is another"
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) == 10
    path = [str(ROOT / "client"), str(ROOT)]
    script = f"import sys; sys.path[:0] = {path!r}\n" + code.replace(ADDRESS, address)
    run = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    recalled, attended = run.stdout.split("\n", 1)
    assert f"# {recalled}" in code, "the comment shows what is printed"
    assert re.fullmatch(r"\[\[[-+\de.\s]+\]\]\n", attended)


def post_as_curl_would(command: str) -> httpx.Response:
    """The request of one curl command that has -X, -H and -d only."""
    program, *words = shlex.split(command)
    assert program == "curl"
    (url,) = (
        word for place, word in enumerate(words) if word.startswith("http") and words[place - 1] not in ("-H", "-d")
    )
    options = list(pairwise(words))
    headers = dict(value.split(": ", 1) for flag, value in options if flag == "-H")
    (body,) = (value for flag, value in options if flag == "-d")
    (method,) = [value for flag, value in options if flag == "-X"] or ["POST"]
    return httpx.request(method, url, headers=headers, content=body, trust_env=False)


def test_curl_example(address: str) -> None:
    text = block("sh", "curl")
    assert (ROOT / "examples" / "quickstart.sh").read_text().endswith(text), "examples/quickstart.sh is another"
    commands = text.replace("\\\n", " ").replace(ADDRESS, address).splitlines()
    answers = [post_as_curl_would(command) for command in commands]
    assert [answer.status_code for answer in answers] == [201, 200, 200, 200]
    assert answers[2].json()["found"][0][0]["payload"] == {"text": "dogs bark"}
    (recalled,) = answers[-1].json()["recalled"]
    assert recalled[0]["payload"] == {"text": "dogs bark"}
    if shutil.which("curl"):  # the same by curl itself, where there is one
        script = (
            (ROOT / "examples" / "quickstart.sh").read_text().replace(ADDRESS, address).replace("/pet", "/pet-by-curl")
        )
        run = subprocess.run(["sh"], input=script, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        assert run.stdout.endswith(answers[-1].text)


def test_make_commands_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pages = README + (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", pages, re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


PAGES = ["README.md", "CONTRIBUTING.md", "client/README.md"]
PAGES += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]


def anchors(text: str) -> set[str]:
    """What a link may name after #: a page's headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    missing = []
    for link in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text()):
        name, _, anchor = link.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        if not urlsplit(link).scheme and not (path.exists() and (not anchor or anchor in anchors(path.read_text()))):
            missing.append(link)
    assert not missing


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/lab.md"])  # it names what went, too
def test_files_that_pages_name_exist(page: str) -> None:
    named = re.findall(r"`((?:\w+/)+\w+\.py)`", (ROOT / page).read_text())
    missing = [name for name in named if not any((ROOT / base / name).exists() for base in ("", "htm_service"))]
    assert not missing


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_nothing_of_a_page_stands_twice(page: str) -> None:
    """Merges of pages that two branches wrote on left lines twice, and headings without an empty line before them."""
    text = (ROOT / page).read_text()
    without_code = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert not re.findall(r"^.*[^\n]\n#+ .*$", without_code, re.MULTILINE), "a heading right below a text"
    sections = re.split(r"^## ", without_code, flags=re.MULTILINE) if page == "CHANGELOG.md" else [without_code]
    for section in sections:
        lines = [line for line in section.splitlines() if re.match(r"#+ |[-\w`].{40}", line)]
        assert [line for line in lines if lines.count(line) > 1] == []


def test_every_page_is_linked() -> None:
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= set(re.findall(r"\]\(([^)#]+)", README)), "the README links every page of docs/"


def read_tree() -> dict[str, str]:
    """Folders, with a slash at the end, and their lines."""
    entries: dict[str, str] = {}
    folders: list[str] = []
    for line in block("", "api/").splitlines():
        match = re.fullmatch(r"((?:  )*)(\S+)\s{2,}(\S.*)", line)
        assert match is not None, f"{line!r} is not a name, two spaces or more, and a comment"
        del folders[len(match[1]) // 2 :]
        path = "".join(folders) + match[2]
        assert path not in entries, f"{path} stands twice"
        entries[path] = match[3]
        if path.endswith("/"):
            folders.append(match[2])
    return entries


def test_folders_are_what_git_tracks() -> None:
    """Every folder that holds code has its line, and every line its folder; files speak for themselves."""
    listed = set(read_tree())
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]  # also what is not yet added
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = [Path(name) for name in listing.stdout.split("\0") if name and (ROOT / name).exists()]
    folders = {f"{parent.as_posix()}/" for name in tracked for parent in name.parents if parent != Path()}
    assert listed <= folders, f"the folders of README.md that git does not have: {sorted(listed - folders)}"
    unsaid = {
        folder
        for folder in folders - listed
        if not folder.startswith((".", "docs/", "tests/", "client/")) and "/versions/" not in folder
    }
    assert not unsaid, f"README.md lacks a line for {sorted(unsaid)}"
