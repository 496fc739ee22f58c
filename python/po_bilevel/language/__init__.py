"""Policies and rewards of texts: see docs/language.md."""
