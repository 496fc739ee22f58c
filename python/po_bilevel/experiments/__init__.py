"""Experiments: each a typed configuration, a function that checks it and one that runs it."""
