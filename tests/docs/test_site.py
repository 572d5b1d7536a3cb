"""Test that the site builds with valid links, and that pages name files and commands that exist."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# A page names a file relative to the root or to a package.
FOLDERS = [ROOT, ROOT / "fastpref", ROOT / "kernels" / "fastpref_kernels"]
PICTURES = sorted((ROOT / "docs" / "assets" / "kernels").glob("*.svg"))


def test_it_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    pytest.importorskip("material")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "api" / "index.html").read_text()
    assert 'id="fastpref.linear_dpo_loss"' in api
    # Hidden blocks, which set up a page for the tests, are not in the site.
    assert "invisible-code-block" not in (tmp_path / "search" / "search_index.json").read_text()
    assert not list(tmp_path.rglob("*.py"))
    assert "|---" not in (tmp_path / "benchmarks" / "index.html").read_text()  # tables inside <details> are tables


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.stem)
def test_a_picture_has_a_title_and_a_white_background(picture: Path) -> None:
    root = ET.parse(picture).getroot()
    svg = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{svg}svg"
    assert root.find(f"{svg}title") is not None
    behind = root.find(f"{svg}rect")
    assert behind is not None
    assert behind.get("fill") == "white"
    page = (ROOT / "docs" / "kernels" / f"{picture.stem}.md").read_text()
    assert f"../assets/kernels/{picture.name}" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_targets_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    named = set(re.findall(r"`([\w-]+(?:/[\w.-]+)*/[\w-]+\.(?:py|cpp|h|md|csv|yml|toml))`", text))
    assert not {name for name in named if not any((folder / name).exists() for folder in FOLDERS)}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make\s+([a-z-]+)", text)) <= targets
    if page.parent == ROOT:  # the build checks the links between pages of the site
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
        assert links
        assert not {link for link in links if not (ROOT / link).exists()}
