"""`python -m po_bilevel` is `po-bilevel`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
