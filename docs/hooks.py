"""What the site has besides docs/: README and its like, the files that pages link to, and the reference.

MkDocs calls these functions: https://www.mkdocs.org/user-guide/configuration/#hooks.
"""

import importlib
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "examples/README.md": "examples/index.md",
}
PACKAGES = ("po_kernels", "po_bilevel", "po_bilevel.hypergradients", "po_bilevel.language")
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s\"]+)")


def on_files(files: Files, config: Any) -> Files:
    linked: set[str] = set()
    for source in [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]:
        for target in LINK.findall((ROOT / source).read_text()):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
            if path not in PAGES and not path.startswith("docs/") and (ROOT / path).is_file():
                linked.add(path)
    made = {PAGES[name]: moved((ROOT / name).read_text(), name, PAGES[name]) for name in PAGES}
    made |= {shown(path): content_of(path) for path in linked}
    made |= {f"api/{name}.md": reference(name) for name in PACKAGES}
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    uri = page.file.src_uri
    return markdown if page.file.generated_by else moved(markdown, f"docs/{uri}", uri)


def shown(path: str) -> str:
    """Where a file of the repository is on the site."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}" if path.endswith(".ipynb") else f"source/{path}.md"


def moved(markdown: str, source: str, uri: str) -> str:
    """The links of a file as they are from its place on the site."""

    def link(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        if not (ROOT / path).is_file():
            return match[1]  # MkDocs says that there is none
        return posixpath.relpath(shown(path), posixpath.dirname(uri) or ".")

    return LINK.sub(link, markdown)


def content_of(path: str) -> str:
    """A notebook as it is, to be downloaded; other files as pages."""
    if path.endswith(".ipynb"):
        return (ROOT / path).read_text()
    language = {".py": "python", ".toml": "toml", ".sh": "bash"}.get(Path(path).suffix, "text")
    return f"# {path}\n\n````{language}\n{(ROOT / path).read_text()}````\n"


def reference(name: str) -> str:
    """Every public name of a package, with its docstring; a link to where it is used if that has no example."""
    sys.path[:0] = [str(ROOT), str(ROOT / "python")]
    try:
        from tests.pages import public, used_on

        package = importlib.import_module(name)
        lines = [f"# {name}", ""]
        for each in public(package):
            lines += [f"::: {name}.{each}", ""]
            if ">>>" not in (getattr(package, each).__doc__ or "") and (pages := used_on(each)):
                lines += ["Used in " + ", ".join(f"[{title}](../{shown(page)})" for page, title in pages.items()), ""]
    finally:
        del sys.path[:2]
    return "\n".join(lines)
