"""`python -m po_kernels`: the state of this installation, readable."""

from .report import render, status

if __name__ == "__main__":
    print(render(status()))
