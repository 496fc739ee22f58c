"""Our ops, and rewards that are learned, in the libraries that train language models: see examples/README.md.

Nothing is imported here: `po_bilevel.integrations.trl` and `.verl` import the library that they are named after.
"""
