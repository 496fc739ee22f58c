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

README = Path(__file__).parent.parent / "README.md"
DOCS = README.parent / "docs"


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
    public = {each: getattr(po_bilevel, each) for each in po_bilevel.__all__}
    names = vars(po_kernels) | public | vars(module) | {"torch": torch, "pk": po_kernels}
    failed, _ = doctest.testmod(module, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_the_example_of_estimators(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "estimators.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(block, names)
    assert names["model"].coef_.shape == (1, 30)
    names["RewardDisplay"].from_estimator(names["model"]).figure_.clear()


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


def test_the_readme_learns_a_reward_to_its_closed_form(capsys):
    """Without a warning, which would be an error here."""
    (block,) = (
        code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "BilevelTrainer" in code
    )
    exec(block, {})
    lines = capsys.readouterr().out.splitlines()
    learned, closed = ([float(x) for x in re.findall(r"\d\.\d+", line)] for line in lines)
    # As far as a hundred steps of Adam at a rate of 0.1 come to rest.
    assert learned == pytest.approx(closed, rel=0.02)
    for values in (learned, closed):
        assert ", ".join(f"{value:.2f}" for value in values) in block


def test_one_version():
    """In the metadata, in how to cite it, and at the top of what has changed."""
    places = {"pyproject.toml": 'version = "(.*)"', "CITATION.cff": "version: (.*)", "CHANGELOG.md": "## (.*)"}
    found = {
        name: re.search(f"(?m)^{pattern}$", (README.parent / name).read_text())[1] for name, pattern in places.items()
    }
    assert len(set(found.values())) == 1, found
