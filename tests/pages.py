"""Pages of documentation, and the blocks of Python on them."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[tuple[str, str]]:
    """What has to be there, such as cuda, and the code, of each block of a page.

    `<!-- needs cuda -->` in the line before a block says so; most need nothing. The code is on the lines of the page,
    for tracebacks to tell.
    """
    text = (ROOT / page).read_text()
    found = re.finditer(r"(?:<!-- needs (\w+) -->\n)?```python\n(.*?)```", text, re.DOTALL)
    return [(each[1] or "", "\n" * text.count("\n", 0, each.start(2)) + each[2]) for each in found]


def pages() -> list[str]:
    """Those with blocks."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")]
    return [page for page in sorted(path.relative_to(ROOT).as_posix() for path in found) if blocks(page)]


def used_on(name: str) -> dict[str, str]:
    """The titles of pages whose blocks have the name, by page."""
    found = [page for page in pages() if any(re.search(rf"\b{name}\b", code) for _, code in blocks(page))]
    return {page: re.findall(r"(?m)^# (.*)$", (ROOT / page).read_text())[0] for page in found}


def public(package: Any) -> list[str]:
    """The names that a package offers: the estimators too, which `from po_bilevel import *` leaves out."""
    return sorted({*package.__all__, *{"BilevelClassifier", "BilevelRegressor"}.intersection(dir(package))})
