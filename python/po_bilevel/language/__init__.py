"""Policies and rewards of texts: see docs/language.md."""

from .causal import CausalModel, Head
from .decoder import Decoder
from .policy import Completions, TokenPolicy, Tokens

__all__ = ["CausalModel", "Completions", "Decoder", "Head", "TokenPolicy", "Tokens"]
