"""Tabular data for classification: built-in sets, sets of openml.org and files, split and standardised.

What cannot be used is a UsageError that names the option, what was expected and what came; scikit-learn or pandas that
is not installed a MissingDependencyError.
"""

import functools
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..errors import UsageError
from ..losses import Batch
from ..optional import require

BUILT_IN = ("wine", "iris", "breast_cancer", "digits")
# Numbers of data sets at openml.org, which are versions too: spambase, default-of-credit-card-clients, poker-hand.
OPENML = {"spambase": 44, "credit_default": 42477, "poker": 1567}
READERS = {".csv": "CSV", ".parquet": "Parquet"}
# Parts that rows are held out in where they choose something themselves.
FOLDS = 5


@dataclass(frozen=True)
class Table:
    """A classification data set.

    Attributes:
        name: of the data set.
        inputs: (N, F) float64, as read.
        labels: (N,) int64, from 0 to C-1.
        classes: the C names of the classes, in the order of the labels.
    """

    name: str
    inputs: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Splits:
    """Disjoint stratified parts of a table, standardised by the mean and variance of `train`.

    Attributes:
        train: all rows that training may see, in whatever way: fit and held_out together.
        fit, held_out: the two parts of train: what the inner and the outer loss read while a reward is learned.
        test: read for the final metrics and for the learning curves, never for a choice.
    """

    train: Batch
    fit: Batch
    held_out: Batch
    test: Batch


# How a file's columns of text become numbers: not at all, by a column of zeros and ones for each text, or by the text's
# place among all in alphabetical order.
Encoding = Literal["none", "onehot", "ordinal"]
# More are a name of each row and nothing to learn from.
MOST_TEXTS = 256


def load(dataset: str, target: str | None = None, encoding: Encoding = "none") -> Table:
    """A data set by its name, or from a file.

    Args:
        dataset: one of BUILT_IN; one of OPENML, from scikit-learn's cache or else the network; or the path of a CSV or
            Parquet file whose columns but the target's are numbers.
        target: the column that holds the classes of a file. In a CSV file its entries are texts: 01 and 1 are two.
        encoding: of a file's columns of text, of which a missing entry is one; "none" refuses them.
    """
    if dataset in BUILT_IN or dataset in OPENML:
        if target is not None:
            raise UsageError(f"--target: expected none with the data set {dataset!r}, got {target!r}")
        if encoding != "none":
            raise UsageError(f"--encoding: expected none with the data set {dataset!r}, got {encoding!r}")
        return _built_in(dataset) if dataset in BUILT_IN else _openml(dataset)
    path = Path(dataset)
    if path.suffix.lower() not in READERS and not path.is_file():
        raise UsageError(
            f"--dataset: expected one of {', '.join((*BUILT_IN, *OPENML))} or the path of a CSV or Parquet file, "
            f"got {dataset!r}"
        )
    found = path.stat() if path.is_file() else None
    return _file(path, target, encoding, found and (found.st_mtime_ns, found.st_size))


@functools.lru_cache(maxsize=8)
def _file(path: Path, target: str | None, encoding: Encoding, version: object) -> Table:
    """Read once, for a run may be in parts, as long as the file's version stays."""
    pandas = require("pandas", "sklearn")
    frame = _parquet(pandas, path) if path.suffix.lower() == ".parquet" else _csv(pandas, path, target)
    return _from_frame(pandas, path.stem, str(path), frame, target, encoding)


def subset(table: Table, max_rows: int | None) -> Table:
    """A stratified random choice of max_rows rows, the same each time; the table itself if it has no more."""
    if max_rows is None or len(table.labels) <= max_rows:
        return table
    if max_rows < len(table.classes):
        raise UsageError(f"--max-rows: expected at least the {len(table.classes)} classes, got {max_rows}")
    selection = require("sklearn.model_selection", "sklearn")
    kept, _ = selection.train_test_split(
        np.arange(len(table.labels)), train_size=max_rows, stratify=table.labels, random_state=0
    )
    kept.sort()
    return Table(table.name, table.inputs[kept], table.labels[kept], table.classes)


def split(table: Table, *, test_fraction: float, held_out_fraction: float, seed: int) -> Splits:
    """Stratified random splits; the scaler is fitted on `train` only.

    Args:
        test_fraction: of all rows.
        held_out_fraction: of the rows that are not test rows.
        seed: of the random splits.
    """
    for option, value in (("--test-fraction", test_fraction), ("--held-out-fraction", held_out_fraction)):
        if not 0 < value < 1:
            raise UsageError(f"{option}: expected a number between 0 and 1, got {value}")
    _large_enough(table, test_fraction, held_out_fraction)
    selection = require("sklearn.model_selection", "sklearn")
    preprocessing = require("sklearn.preprocessing", "sklearn")
    rows = np.arange(len(table.labels))
    train, test = selection.train_test_split(rows, test_size=test_fraction, stratify=table.labels, random_state=seed)
    fit, held_out = selection.train_test_split(
        train, test_size=held_out_fraction, stratify=table.labels[train], random_state=seed
    )
    scaler = preprocessing.StandardScaler().fit(table.inputs[train])

    def part(index: np.ndarray) -> Batch:
        return Batch(torch.from_numpy(scaler.transform(table.inputs[index])), torch.from_numpy(table.labels[index]))

    return Splits(train=part(train), fit=part(fit), held_out=part(held_out), test=part(test))


def folds(rows: Batch, seed: int) -> list[tuple[Batch, Batch]]:
    """(the other rows, a fifth of them) for each fifth of random rows, stratified if the targets are labels."""
    order = np.random.RandomState(seed).permutation(len(rows.inputs))
    if not rows.target.is_floating_point():
        order = order[np.argsort(rows.target.numpy()[order], kind="stable")]
    place = torch.empty(len(order), dtype=torch.int64)
    place[order] = torch.arange(len(order)) % FOLDS
    inside = [place == fold for fold in range(FOLDS)]
    return [(rows.rows((~mask).nonzero()[:, 0]), rows.rows(mask.nonzero()[:, 0])) for mask in inside]


def _built_in(name: str) -> Table:
    bunch = getattr(require("sklearn.datasets", "sklearn"), f"load_{name}")()
    return Table(
        name,
        np.asarray(bunch.data, dtype=np.float64),
        np.asarray(bunch.target, dtype=np.int64),
        tuple(map(str, bunch.target_names)),
    )


@functools.lru_cache(maxsize=8)
def _openml(name: str) -> Table:
    datasets = require("sklearn.datasets", "sklearn")
    pandas = require("pandas", "sklearn")
    try:
        with warnings.catch_warnings():
            # It warns of each attempt; the error below says how it ended.
            warnings.simplefilter("ignore")
            # The cache is looked at first, and has to do where there is no network.
            # The faster parser, pandas, fails on categories that are numbers (scikit-learn 1.9 with pandas 3).
            bunch = datasets.fetch_openml(
                data_id=OPENML[name], as_frame=True, parser="liac-arff", n_retries=1, delay=0.1
            )
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--dataset: expected {name!r} in the cache {datasets.get_data_home()!r} or from openml.org, got neither: "
            f"{error}; give the path of a CSV or Parquet file with these rows, and its --target"
        ) from None
    features = bunch.data.copy()
    for column in features.columns[features.dtypes == "category"]:
        # Categories that are numbers keep their order; credit_default and poker have no others.
        features[column] = pandas.to_numeric(features[column], errors="coerce")
    frame = features.assign(**{bunch.target.name: bunch.target})
    return _from_frame(pandas, name, name, frame, bunch.target.name)


def _parquet(pandas: Any, path: Path) -> Any:
    require("pyarrow", "sklearn")
    try:
        frame = pandas.read_parquet(path)
        # What pandas took for its index are columns of the file, but for counted rows.
        if not isinstance(frame.index, pandas.RangeIndex) or frame.index.name is not None:
            names = [f"Unnamed: {i}" if name is None else name for i, name in enumerate(frame.index.names)]
            frame = frame.reset_index(names=names)
        return frame
    except FileNotFoundError:
        raise UsageError(f"--dataset: expected a Parquet file, and there is none at {str(path)!r}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"--dataset: expected a Parquet file, and {str(path)!r} is none: {error}") from None


def _csv(pandas: Any, path: Path, target: str | None) -> Any:
    try:
        with warnings.catch_warnings():
            # By default a first row with one field too many makes the first column an index, without a word.
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            # In parts a column of texts may have another type in each.
            frame = pandas.read_csv(path, index_col=False, dtype={target: str}, low_memory=False)
    except FileNotFoundError:
        raise UsageError(f"--dataset: expected a CSV file, and there is none at {str(path)!r}") from None
    except (
        OSError,
        UnicodeDecodeError,
        pandas.errors.ParserError,
        pandas.errors.EmptyDataError,
        pandas.errors.ParserWarning,
    ) as error:
        raise UsageError(f"--dataset: expected a CSV file, and {str(path)!r} cannot be read as one: {error}") from None
    header = pandas.read_csv(path, header=None, nrows=1, index_col=False, dtype=str).iloc[0]
    if repeated := sorted(set(header[header.duplicated()].dropna())):
        raise UsageError(f"--dataset: expected each column's name once, got {', '.join(map(repr, repeated))} again")
    return frame


def _from_frame(
    pandas: Any, name: str, source: str, frame: Any, target: str | None, encoding: Encoding = "none"
) -> Table:  # fmt: skip
    """A table of a frame's columns, all of them numbers, or encoded as such, but the target's."""
    columns = ", ".join(map(repr, frame.columns))
    # What pandas calls a column without a name, and writes where it is not told index=False.
    if unnamed := [name for name in frame.columns if re.fullmatch(r"Unnamed: \d+", str(name))]:
        raise UsageError(
            f"--dataset: expected a name for each column of {source!r}, got none for {', '.join(map(repr, unnamed))}; "
            "drop it if it counts the rows, or name it"
        )
    if target is None:
        raise UsageError(f"--target: expected the column of {source!r} that holds the classes, one of {columns}")
    if target not in frame.columns:
        raise UsageError(f"--target: expected a column of {source!r}, one of {columns}, got {target!r}")
    features = frame.drop(columns=target)
    if features.shape[1] < 1:
        raise UsageError(f"--dataset: expected feature columns besides {target!r} in {source!r}, got none")
    if frame[target].isna().any():
        raise UsageError(f"--target: expected a class in every row, got {_missing(frame[target])} in column {target!r}")
    if encoding != "none":
        features = _encoded(pandas, features, encoding)
    for place in range(features.shape[1]):
        _numeric(pandas, source, features.iloc[:, place])
    names, labels = np.unique(frame[target].astype(str).to_numpy(dtype=str), return_inverse=True)
    if len(names) != frame[target].nunique():
        raise UsageError(
            f"--target: expected classes of one type in {target!r}, got some of the same text, as 1 and '1'"
        )
    return Table(name, features.to_numpy(dtype=np.float64), labels.astype(np.int64), tuple(str(name) for name in names))


def _encoded(pandas: Any, features: Any, encoding: Encoding) -> Any:
    """The columns, with numbers for those of text and of categories."""
    numbers, encoded = [], []
    for name, column in features.items():
        category = isinstance(column.dtype, pandas.CategoricalDtype)
        if not category and not any(isinstance(x, str) for x in column):
            numbers.append(column)
            continue
        # A missing entry as a text that no other sorts before or equals.
        texts = column.astype(object).map(lambda x: "" if pandas.isna(x) else f"={x}")
        if encoding == "ordinal":
            ranks = column.cat.codes if category and column.cat.ordered else texts.rank(method="dense") - 1
            encoded.append(ranks.astype(float).rename(name))
        elif texts.nunique() > MOST_TEXTS:
            raise UsageError(
                f"--encoding: expected columns of at most {MOST_TEXTS} texts for onehot, got {texts.nunique()} in "
                f"column {name!r}; drop it, or take ordinal"
            )
        else:
            encoded.append(pandas.get_dummies(texts, prefix=name, dtype=float))
    return pandas.concat([*numbers, *encoded], axis=1)


def _numeric(pandas: Any, source: str, column: Any) -> None:
    """Refuses a feature column with anything but finite numbers (truth values count as 0 and 1)."""
    if column.isna().any():
        raise UsageError(
            f"--dataset: expected numbers in every row of {source!r}, got {_missing(column)} in column "
            f"{column.name!r}; fill in or drop these rows"
        )
    if isinstance(column.dtype, pandas.PeriodDtype) or column.dtype.kind in "mMc":
        # Whose numbers would be nanoseconds, or lack a part.
        numbers = np.full(len(column), np.nan)
    else:
        numbers = pandas.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    bad = ~np.isfinite(numbers)
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise UsageError(
            f"--dataset: expected finite numbers in column {column.name!r} of {source!r}, got "
            f"{str(column.iloc[first])!r} in data row {first + 1}; encode texts by --encoding "
            "onehot or ordinal, or drop the column"
        )


def refuse_non_finite(what: str, values: np.ndarray) -> None:
    """Refuses rows (N, D) with anything but finite numbers of float32; what says of what, from the option on."""
    with np.errstate(over="ignore"):
        bad = np.argwhere(~np.isfinite(values.astype(np.float32)))
    if len(bad):
        row, column = bad[0]
        raise UsageError(
            f"{what}: expected finite numbers, got {values[row, column]} in row {row}, column {column}, counted from 0 "
            f"({len(np.unique(bad[:, 0]))} of {len(values)} rows have such)"
        )


def _missing(column: Any) -> str:
    rows = np.flatnonzero(column.isna().to_numpy())
    return f"{len(rows)} missing value{'s' if len(rows) > 1 else ''} (first in data row {rows[0] + 1})"


def _large_enough(table: Table, test_fraction: float, held_out_fraction: float) -> None:
    if len(table.labels) == 0:
        raise UsageError(f"--dataset: expected rows in {table.name!r}, got none")
    counts = np.bincount(table.labels, minlength=len(table.classes))
    if len(table.classes) < 2:
        raise UsageError(f"--dataset: expected at least two classes in {table.name!r}, got only {table.classes[0]!r}")
    # Each part gets about its fraction of each class: the smallest such share has to be a row.
    smallest_share = min(
        test_fraction,
        (1 - test_fraction) * held_out_fraction,
        (1 - test_fraction) * (1 - held_out_fraction),
    )
    needed = math.ceil(round(1 / smallest_share, 6))
    least = int(counts.argmin())
    if counts[least] < needed:
        raise UsageError(
            f"--dataset: expected at least {needed} rows of each class in {table.name!r}, so that every split has "
            f"one, got {counts[least]} of class {table.classes[least]!r} ({len(table.labels)} rows, "
            f"{len(table.classes)} classes); is the target a class, not a number to predict?"
        )
