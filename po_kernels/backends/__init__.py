"""Implementations of the operations; see `contract` for what each offers."""
