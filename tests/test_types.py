"""What type checkers and `dir` are told is what there is; versions, wherever the packages run from."""

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import po_bilevel
import pytest
from po_bilevel import language

import po_kernels
from po_kernels import dispatch
from po_kernels.backends.advantages import ADVANTAGES
from po_kernels.backends.contract import ESTIMATORS, OPS, REDUCTIONS
from po_kernels.ops import _types, policy
from tests import user

ROOT = Path(__file__).parents[1]


def test_literals_are_what_the_checks_accept():
    for literal, allowed in (
        (_types.Backend, dispatch.BACKENDS), (_types.Advantage, ADVANTAGES), (_types.Reduction, REDUCTIONS),
        (_types.Ratio, policy.RATIOS), (_types.SurrogateName, policy.SURROGATES),
        (_types.Divergence, policy.DIVERGENCES), (_types.Placement, policy.PLACEMENTS),
        (_types.Aggregation, policy.AGGREGATIONS), (_types.Sampled, OPS["gaussian_surrogate_loss"].estimators),
        (_types.GaussianEstimator, OPS["mvn_policy_loss"].estimators),
        (_types.CategoricalEstimator, OPS["categorical_policy_loss"].estimators), (_types.Estimator, ESTIMATORS),
    ):  # fmt: skip
        assert set(get_args(literal)) == set(allowed)


@pytest.mark.parametrize("op", [each for each in OPS if each.endswith("_loss")] + ["policy_loss"])
def test_options_by_name_are_those_of_the_function(op):
    """Of the overloads, whose options are a TypedDict; the rest of the signature mypy compares."""
    named = inspect.signature(getattr(po_kernels, op)).parameters
    options = {name for name, each in named.items() if each.kind is each.KEYWORD_ONLY} - {"return_stats", "estimator"}
    family = "Action" if op == "policy_loss" else "Policy" if op.endswith("_policy_loss") else "Surrogate"
    assert options == set(getattr(_types, f"{family}Options").__annotations__)


def functions(package):
    return [name for name in package.__all__ if inspect.isfunction(getattr(package, name))]


@pytest.mark.filterwarnings("ignore::po_bilevel.HypergradientWarning")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_what_a_user_writes_runs_and_leaves_nothing_out(tmp_path):
    """`make lint` has mypy --strict read it."""
    for part in (user.operations, user.functions, user.rewards_learned, user.hypergradients, user.modules):
        assert part()
    assert user.estimators()
    assert user.watched(tmp_path)
    assert user.texts(tmp_path)
    text = Path(user.__file__).read_text()
    for short, package in (("pk", po_kernels), ("pb", po_bilevel)):
        assert not [name for name in package.__all__ if not re.search(rf"\b{short}\.{name}\b", text)]
    for short, package in (("pk", po_kernels), ("pb", po_bilevel), ("lm", language)):
        assert not [name for name in functions(package) if f"{short}.{name}(" not in text]


def untyped(initialiser):
    """Public attributes that it makes of another thing than an argument, and says no type of."""
    arguments = {each.arg for each in (*initialiser.args.args, *initialiser.args.kwonlyargs)}
    typed, made = set(), set()
    for each in ast.walk(initialiser):
        if not isinstance(each, ast.Assign | ast.AnnAssign):
            continue
        targets = each.targets if isinstance(each, ast.Assign) else [each.target]
        names = {part.attr for target in targets for part in ast.walk(target) if isinstance(part, ast.Attribute)}
        plain = isinstance(each.value, ast.Name) and each.value.id in arguments
        (typed if plain or isinstance(each, ast.AnnAssign) else made).update(names)
    return {name for name in made - typed if not name.startswith("_")}


def test_public_attributes_have_types():
    """Where none is written, each type checker infers its own: `basedpyright --verifytypes` tells."""
    for package in (po_kernels, po_bilevel):
        for path in Path(package.__file__).parent.rglob("[!_]*.py"):
            for each in ast.walk(ast.parse(path.read_text())):
                if isinstance(each, ast.ClassDef) and not each.name.startswith("_"):
                    declared = {part.target.id for part in each.body if isinstance(part, ast.AnnAssign)}
                    for method in each.body:
                        if getattr(method, "name", "") == "__init__":
                            assert untyped(method) <= declared, f"{path}: {each.name}: {untyped(method) - declared}"


def test_both_packages_say_that_they_are_typed():
    for package in (po_kernels, po_bilevel):
        assert Path(package.__file__).with_name("py.typed").exists()


def test_dir_has_what_is_public_and_nothing_else():
    assert set(dir(po_bilevel)) == {*po_bilevel.__all__, "BilevelClassifier", "BilevelRegressor", "__version__"}
    assert all(getattr(po_bilevel, name) is not None for name in dir(po_bilevel))
    assert po_bilevel.losses.Batch is po_bilevel.Batch
    with pytest.raises(AttributeError, match="module 'po_bilevel' has no attribute 'BilevelTrainr'"):
        po_bilevel.BilevelTrainr  # noqa: B018


def test_versions_of_a_tree_that_was_never_installed():
    hidden = """
import importlib.metadata as metadata
def version(name, found=metadata.version):
    if name == "po-kernels": raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.version = version
import po_kernels, po_bilevel
print(po_kernels.__version__, po_bilevel.__version__, po_kernels.status()["version"])
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    run = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, check=True, env=environment)
    first, *others = run.stdout.split()
    assert first.endswith("+source")
    assert f'version = "{first.removesuffix("+source")}"' in (ROOT / "pyproject.toml").read_text()
    assert set(others) == {first}
