"""Pages of docs/ that are written by scripts say what the scripts find, and examples in docstrings what they print."""

import doctest
import importlib
import itertools
import pkgutil
import re
from pathlib import Path

import po_bilevel
import po_bilevel.language
import pytest
import torch

import po_kernels
from tests import derivative_table

DOCS = Path(__file__).parent.parent / "docs"


def test_the_derivative_table_is_what_the_operations_do():
    assert (DOCS / "derivatives.md").read_text() == derivative_table.table()


def modules():
    """Those that import nothing which may be missing."""
    for package in (po_kernels.ops, po_bilevel, po_bilevel.hypergradients, po_bilevel.language):
        for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            if not module.ispkg and module.name != "po_bilevel.__main__":
                yield module.name


@pytest.mark.parametrize("name", list(modules()))
def test_examples_in_docstrings(name):
    torch.manual_seed(0)
    module = importlib.import_module(name)
    # Public names and those of the module itself are there, as for whoever reads them.
    names = vars(po_kernels) | vars(po_bilevel) | vars(module) | {"torch": torch, "pk": po_kernels}
    failed, _ = doctest.testmod(module, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


@pytest.mark.parametrize("page", ["hypergradients.md", "porting.md"])
def test_examples_of_pages(page):
    """All blocks of a page, in one name space, from the first that imports."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    run = list(itertools.dropwhile(lambda block: "import" not in block, blocks))
    names: dict = {}
    for block in run:
        exec(block, names)
    assert len(run) >= 2


def test_what_the_table_of_features_links_to_is_there():
    links = re.findall(r"\]\(\.\./(tests/[^ )]*) \"(\w+)\"\)", (DOCS / "hypergradients.md").read_text())
    assert len(links) > 20
    for file, name in links:
        assert f"def {name}(" in (DOCS.parent / file).read_text(), (file, name)


def test_the_example_of_rewards_of_text(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "language.md").read_text(), re.DOTALL)
    exec(block, {})
    assert len(capsys.readouterr().out.splitlines()) == 3
