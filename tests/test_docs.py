"""Pages of docs/ that are written by scripts say what the scripts find, and examples in docstrings what they print."""

import doctest
import importlib
import pkgutil
import re
import runpy
import sys

import po_bilevel
import po_bilevel.language
import pytest
import torch

import po_kernels
from tests import derivative_table
from tests.pages import ROOT, blocks, pages, public, used_on

DOCS = ROOT / "docs"


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


@pytest.mark.parametrize("page", pages())
def test_the_blocks_of_a_page_run(page, capsys, monkeypatch, tmp_path):
    """In one name space and in their order, without a warning; and what a page says of what comes out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    torch.set_num_threads(1)  # of so small networks more only wait for each other
    names: dict = {}
    for needs, code in blocks(page):
        assert needs in ("", "cuda"), f"there is no such thing as {needs}"
        if not needs or torch.cuda.is_available():
            exec(compile(code, page, "exec"), names)
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
    SAID.get(page, lambda names, printed: None)(names, capsys.readouterr().out)


def readme_learns_a_reward_to_its_closed_form(names, printed):
    """As far as a hundred steps of Adam at a rate of 0.1 come to rest."""
    learned, closed = ([float(x) for x in re.findall(r"\d\.\d+", line)] for line in printed.splitlines()[-2:])
    assert learned == pytest.approx(closed, rel=0.02)
    for values in (learned, closed):
        assert ", ".join(f"{value:.2f}" for value in values) in blocks("README.md")[-1][1]


def tutorial_learns_what_is_said(names, printed):
    """And the nats that it tells: those of 2000 rows have a standard error of 0.02, and the two within 0.05 are of fits
    to 200 rows. The reward is learned as far as the README's."""
    code = "".join(code for _, code in blocks("docs/tutorial.md"))
    for name in ("given", "closed", "likely", "learned"):
        assert re.search(rf"nll_{name} = .* NLL {names[f'nll_{name}']:.2f}\n", code)
    assert names["nll_given"] > names["nll_closed"] + 0.5
    assert names["nll_closed"] == pytest.approx(names["nll_likely"], abs=0.05)
    assert names["nll_learned"] == pytest.approx(names["nll_closed"], abs=0.01)
    torch.testing.assert_close(names["learned"], names["closed"], rtol=0.02, atol=0.0)


def decoder_learns(names, printed):
    assert names["rewards"].mean() > 0.8


SAID = {
    "README.md": readme_learns_a_reward_to_its_closed_form,
    "docs/tutorial.md": tutorial_learns_what_is_said,
    "docs/policy_loss.md": decoder_learns,
}


def test_the_notebook_is_the_tutorial():
    """Whose blocks are run above."""
    made = runpy.run_path(str(DOCS / "notebook.py"))
    assert made["NOTEBOOK"].read_text() == made["notebook"](made["PAGE"].read_text())


def test_every_fence_is_of_a_known_language():
    """So that no block of Python goes by another name, and is not run."""
    for page in [*ROOT.glob("*.md"), *DOCS.glob("*.md"), ROOT / "examples" / "README.md"]:
        assert set(re.findall(r"(?m)^ *```+ *([^`\n]*)$", page.read_text())) <= {"", "python", "json"}, page


@pytest.mark.parametrize("package", [po_kernels, po_bilevel, po_bilevel.hypergradients, po_bilevel.language])
def test_every_public_name_has_an_example(package):
    """In its own docstring or on a page; both are on the site, and run."""
    finder = doctest.DocTestFinder()
    for name in public(package):
        found = getattr(package, name)
        own = finder.find(found, name) if isinstance(found, type) or callable(found) else []
        examples = "".join(each.source for test in own for each in test.examples)
        assert re.search(rf"\b{name}\b", examples) or used_on(name), name


def test_what_the_table_of_features_links_to_is_there():
    links = re.findall(r"\]\(\.\./(tests/[^ )]*) \"(\w+)\"\)", (DOCS / "hypergradients.md").read_text())
    assert len(links) > 20
    for file, name in links:
        assert f"def {name}(" in (ROOT / file).read_text(), (file, name)


def test_one_version():
    """In the metadata, in how to cite it, and at the top of what has changed."""
    places = {"pyproject.toml": 'version = "(.*)"', "CITATION.cff": "version: (.*)", "CHANGELOG.md": "## (.*)"}
    found = {name: re.search(f"(?m)^{pattern}$", (ROOT / name).read_text())[1] for name, pattern in places.items()}
    assert len(set(found.values())) == 1, found
