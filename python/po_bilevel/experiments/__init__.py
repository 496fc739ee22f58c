"""Experiments: each a typed configuration and a function that runs it."""
