"""The documentation site: it builds without a warning, no link is broken, and nothing is fetched when it is read."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest

import modelhub

pytest.importorskip("mkdocs", reason="pip install 'modelhub[docs]'")
REPO = Path(__file__).parents[1]
FETCHED = {("img", "src"), ("script", "src"), ("iframe", "src"), ("source", "src"), ("link", "href")}


class Page(HTMLParser):
    """Its anchors, where it links to, and what a browser fetches to show it."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.fetched, self.mermaid = set(), [], [], False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            self.mermaid |= (name, value) == ("class", "mermaid")
            if name in ("id", "name"):
                self.ids.add(value)
            elif (tag, name) in FETCHED and ("rel", "canonical") not in attrs:
                self.fetched.append(value)
            elif (tag, name) == ("a", "href"):
                self.links.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder], cwd=REPO, text=True,
        capture_output=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(REPO)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html")}


def test_every_page_is_there(site, pages):
    written = {path.relative_to(REPO / "docs").with_suffix(".html") for path in (REPO / "docs").rglob("*.md")}
    assert written <= {path.relative_to(site) for path in pages} and len(written) >= 24


def test_links_and_anchors_lead_somewhere(site, pages):
    broken = []
    for path, page in pages.items():
        if path.name == "404.html":  # its addresses begin at the server's root
            continue
        for link in page.links + page.fetched:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (parts.fragment and unquote(parts.fragment) not in pages[target].ids):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert not broken, "\n".join(broken)


def test_nothing_comes_from_elsewhere(site, pages):
    elsewhere = {link for page in pages.values() for link in page.fetched if urlsplit(link).netloc}
    for path in [*site.rglob("*.css"), *site.rglob("*.svg")]:
        elsewhere |= set(re.findall(r"url\([\"']?https?:[^)]*\)", path.read_text(encoding="utf-8")))
    assert not elsewhere
    # The theme would load mermaid from a server for pages that have a diagram of its kind.
    assert not [path.name for path, page in pages.items() if page.mermaid]


def test_the_reference_has_all_that_is_public(pages):
    ids = {name for page in pages.values() for name in page.ids if name}
    for name in modelhub.__all__:
        thing = getattr(modelhub, name)
        if isinstance(thing, ModuleType):
            assert any(found.startswith(f"modelhub.{name}.") for found in ids), name
        elif name != "__version__":
            assert f"modelhub.{name}" in ids, name
    assert {"modelhub.CausalLM.generate", "modelhub.CausalLM.fit", "modelhub.ImageClassifier.publish"} <= ids
