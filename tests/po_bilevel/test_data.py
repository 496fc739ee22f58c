"""Data sets from files and from openml.org's cache."""

import gzip
import hashlib
import json
from decimal import Decimal
from urllib.error import URLError

import numpy as np
import pandas as pd
import pytest
from po_bilevel import UsageError, cli
from po_bilevel.experiments import data

FRAME = pd.DataFrame({
    "length": np.arange(40) % 7, "width": np.linspace(0, 1, 40), "kind": ["rose", "tulip"] * 20,
})  # fmt: skip


def cache(folder, attributes, rows):
    """What scikit-learn keeps of spambase, with these contents."""
    arff = "\n".join(["@RELATION spam", *(f"@ATTRIBUTE {a}" for a in attributes), "@DATA", *rows]) + "\n"
    description = {
        "id": "44", "name": "spambase", "version": "1", "format": "ARFF", "description": "mail", "file_id": "44",
        "status": "active", "default_target_attribute": "class",
        "url": "https://api.openml.org/data/v1/download/44/spambase.arff",
        "md5_checksum": hashlib.md5(arff.encode()).hexdigest(),
    }  # fmt: skip
    features = [
        {
            "index": str(i), "name": a.split()[0], "data_type": "nominal" if "{" in a else "numeric",
            "is_target": str("class" in a).lower(), "is_ignore": "false", "is_row_identifier": "false",
            "number_of_missing_values": "0",
        }
        for i, a in enumerate(attributes)
    ]  # fmt: skip
    api = folder / "openml" / "openml.org"
    for path, content in (
        ("api/v1/json/data/44.gz", {"data_set_description": description}),
        ("api/v1/json/data/features/44.gz", {"data_features": {"feature": features}}),
        (
            "api/v1/json/data/qualities/44.gz",
            {"data_qualities": {"quality": [{"name": "NumberOfInstances", "value": str(len(rows))}]}},
        ),
        ("data/v1/download/44/spambase.arff.gz", arff),
    ):
        target = api / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(gzip.compress((content if isinstance(content, str) else json.dumps(content)).encode()))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("sklearn.datasets._openml.urlopen", refuse)
    monkeypatch.setattr("sklearn.datasets._openml.time.sleep", lambda _: None)
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "cache"))


def test_openml_from_the_cache(tmp_path):
    rows = [f"{i * 0.5},{i % 3},{i % 2}" for i in range(30)]
    cache(tmp_path / "cache", ["freq NUMERIC", "level {0,1,2}", "class {0,1}"], rows)
    table = data.load("spambase")
    assert table.classes == ("0", "1")
    np.testing.assert_array_equal(table.inputs[:4], [[0.0, 0], [0.5, 1], [1.0, 2], [1.5, 0]])
    np.testing.assert_array_equal(table.labels, np.arange(30) % 2)


def test_openml_without_a_network_says_what_to_do(tmp_path):
    with pytest.raises(UsageError, match=r"'poker'.*cache.*no network.*path of a CSV or Parquet file"):
        data.load("poker")


def test_parquet(tmp_path):
    path = tmp_path / "flowers.parquet"
    FRAME.to_parquet(path)
    table = data.load(str(path), "kind")
    assert (table.name, table.classes, table.inputs.shape) == ("flowers", ("rose", "tulip"), (40, 2))
    for content in (None, "not parquet"):
        other = tmp_path / "other.parquet"
        if content:
            other.write_text(content)
        with pytest.raises(UsageError, match=r"--dataset: expected a Parquet file.*other\.parquet"):
            data.load(str(other), "kind")


def test_subset():
    table = data.load("digits")
    part = data.subset(table, 300)
    assert len(part.labels) == 300
    np.testing.assert_array_equal(part.inputs, data.subset(table, 300).inputs)
    assert np.bincount(part.labels).min() >= 28
    assert data.subset(table, 10_000) is table
    with pytest.raises(UsageError, match="--max-rows"):
        data.subset(table, 9)


def test_every_method_and_paired_differences(tmp_path, capsys):
    methods = [
        "nll",
        "pg_learned_isotropic",
        "pg_learned_full",
        "pg_learned_table",
        "pg_learned_cv",
        "logistic_regression",
    ]
    code = cli.main([
        "classify", "--dataset", "iris", "--seeds", "2", "--outer-steps", "2", "--max-rows", "90", "--no-plot",
        "--steps", "30", "--inner-steps", "20", "--out", str(tmp_path), "--methods", *methods,
    ])  # fmt: skip
    assert code == 0
    printed = capsys.readouterr()
    assert "pg_learned_cv - nll" in printed.out
    assert "warning: iris, seed 0, pg_learned_cv: BilevelClassifier: the reward is not where" in printed.err
    found = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["method"] for row in found] == methods * 2
    # From 1 (2 for the estimator) on, for the labels of iris can be told: Adam's first steps are of its learning rate.
    assert all(row["u"] > 1.0 for row in found if row["method"].startswith("pg_"))
    paired = json.loads((tmp_path / "curves.json").read_text())["paired"]
    assert [entry["method"] for entry in paired] == [f"{method} - nll" for method in methods[1:]]
    by_seed = {(row["seed"], row["method"]): row["nll"] for row in found}
    differences = [by_seed[seed, "pg_learned_table"] - by_seed[seed, "nll"] for seed in range(2)]
    assert paired[2]["nll"]["mean"] == pytest.approx(np.mean(differences))


def written(frame, path, **options):
    if path.suffix == ".csv":
        frame.to_csv(path, **options)
    else:
        frame.to_parquet(path, **options)
    return str(path)


def test_an_index_of_a_parquet_file_is_a_column_of_it(tmp_path):
    expected = data.load(written(FRAME, tmp_path / "columns.parquet"), "kind")
    table = data.load(written(FRAME.set_index("length"), tmp_path / "index.parquet"), "kind")
    np.testing.assert_array_equal(table.inputs, expected.inputs)
    table = data.load(written(FRAME.set_index("kind"), tmp_path / "target.parquet"), "kind")
    np.testing.assert_array_equal(table.labels, expected.labels)


def test_a_column_without_a_name_is_refused(tmp_path):
    for path, frame in (
        (tmp_path / "numbered.csv", FRAME),
        (tmp_path / "chosen.parquet", FRAME[FRAME["length"] != 3]),
        (tmp_path / "again.parquet", FRAME.rename(columns={"width": "Unnamed: 0"})),
    ):
        with pytest.raises(UsageError, match=r"--dataset: expected a name for each column of .*'Unnamed: 0'"):
            data.load(written(frame, path), "kind")


@pytest.mark.parametrize(
    "values", [pd.date_range("2020", periods=40), pd.date_range("2020", periods=40, tz="UTC"),
               pd.to_timedelta(np.arange(40), "h"), pd.period_range("2020", periods=40, freq="D")],
)  # fmt: skip
def test_times_are_refused_from_parquet_as_from_csv(values, tmp_path):
    for suffix, options in ((".csv", {"index": False}), (".parquet", {})):
        path = written(FRAME.assign(when=values), tmp_path / f"times{suffix}", **options)
        with pytest.raises(UsageError, match=r"expected finite numbers in column 'when' of .* in data row 1"):
            data.load(path, "kind")


def test_labels_are_the_texts_of_the_file(tmp_path):
    path = tmp_path / "codes.csv"
    path.write_text("x,code\n" + "".join(f"{i},{('01', '1', '2')[i % 3]}\n" for i in range(30)))
    table = data.load(str(path), "code")
    assert table.classes == ("01", "1", "2")
    np.testing.assert_array_equal(table.labels, np.arange(30) % 3)


TEXTS = FRAME.assign(colour=["red", "blue", None, "red"] * 10, size=pd.Categorical(["s", "m", "l", "m"] * 10))


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_texts_are_encoded_where_that_is_asked_for(suffix, tmp_path):
    path = written(TEXTS, tmp_path / f"texts{suffix}", **({"index": False} if suffix == ".csv" else {}))
    with pytest.raises(UsageError, match=r"expected numbers in every row .* in column 'colour'"):
        data.load(path, "kind")
    with pytest.raises(
        UsageError, match=r"column 'size' .* got 's' in data row 1; encode texts by --encoding onehot or"
    ):
        data.load(written(TEXTS.drop(columns="colour"), tmp_path / f"size{suffix}", index=False), "kind")
    colour, size = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 1]]), np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0]])
    onehot = data.load(path, "kind", "onehot").inputs
    np.testing.assert_array_equal(onehot[:, :2], FRAME[["length", "width"]])
    np.testing.assert_array_equal(onehot[:4, 2:5], colour)  # missing, blue, red
    np.testing.assert_array_equal(onehot[:3, 5:], size)  # l, m, s
    ordinal = data.load(path, "kind", "ordinal").inputs
    np.testing.assert_array_equal(ordinal[:4, 2:], [[2, 2], [1, 1], [0, 0], [2, 1]])


def test_what_an_encoding_is_not_for(tmp_path):
    path = written(
        pd.concat([FRAME] * 10).assign(id=[f"row {i}" for i in range(400)]), tmp_path / "id.csv", index=False
    )
    with pytest.raises(UsageError, match=r"--encoding: expected columns of at most 256 texts for onehot, got 400 in"):
        data.load(path, "kind", "onehot")
    with pytest.raises(UsageError, match="--encoding: expected none with the data set 'wine', got 'onehot'"):
        data.load("wine", encoding="onehot")


def test_columns_of_text_that_are_easily_taken_for_others(tmp_path):
    """Names that agree once encoded, decimals, categories in an order, and texts like numbers in a large file."""
    frame = FRAME.assign(**{"a_=b": np.arange(40.0), "a": ["b", "c"] * 20})
    found = data.load(written(frame, tmp_path / "names.csv", index=False), "kind", "onehot").inputs
    assert found.shape == (40, 5)
    np.testing.assert_array_equal(found[:, 3:], np.tile(np.eye(2), (20, 1)))
    sizes = pd.Categorical(["low", "high", "mid", "low"] * 10, categories=["low", "mid", "high"], ordered=True)
    frame = FRAME.assign(price=[Decimal("9.5"), Decimal("10")] * 20, size=sizes)
    found = data.load(written(frame, tmp_path / "kinds.parquet"), "kind", "ordinal").inputs
    np.testing.assert_array_equal(found[:4, 2:], [[9.5, 0], [10, 2], [9.5, 1], [10, 0]])
    rows = 300_000
    path = tmp_path / "large.csv"
    path.write_text("c,kind\n" + "".join(f"{'zz' if i == rows - 1 else '01'},{i % 2}\n" for i in range(rows)))
    assert data.load(str(path), "kind", "onehot").inputs.shape == (rows, 2)
