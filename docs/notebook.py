"""The tutorial as a notebook, and its figures: `python docs/notebook.py` writes both from docs/tutorial.md."""

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PAGE, NOTEBOOK = DOCS / "tutorial.md", DOCS.parent / "examples" / "tutorial.ipynb"


def notebook(page: str) -> str:
    """A cell for each block of Python and for the text between two of them."""
    # The notebook is in another folder than the page.
    page = re.sub(r"\]\((?!https?:|#|\.\./)", "](../docs/", page).replace("](../examples/", "](")
    cells: list[dict[str, Any]] = []
    for number, text in enumerate(re.split(r"```python\n(.*?)```", page, flags=re.DOTALL)):
        source = text.strip().splitlines(keepends=True)
        if number % 2:
            cells.append({"cell_type": "code", "execution_count": None, "outputs": [], "source": source})
        elif source := [line for line in source if not line.startswith("![")]:
            cells.append({"cell_type": "markdown", "source": source})
    for number, cell in enumerate(cells):
        cell |= {"id": f"cell-{number}", "metadata": {}}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def draw(content: str) -> None:
    """Runs a notebook and saves what its cells draw, in their order."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names: dict[str, Any] = {}
    for cell in json.loads(content)["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    for number in pyplot.get_fignums():
        pyplot.figure(number).savefig(DOCS / "figures" / f"tutorial{number}.png", dpi=80)


if __name__ == "__main__":
    made = notebook(PAGE.read_text())
    NOTEBOOK.write_text(made)
    draw(made)
