"""Pages of docs/ that are written by scripts say what the scripts find."""

from pathlib import Path

from tests import derivative_table

DOCS = Path(__file__).parent.parent / "docs"


def test_the_derivative_table_is_what_the_operations_do():
    assert (DOCS / "derivatives.md").read_text() == derivative_table.table()
