"""Policies and rewards of texts: see docs/language.md."""

from .causal import CausalModel, Head
from .closed_form import EmbeddingPrecision, embedding_precision, marginal, residuals
from .decoder import Decoder
from .embedders import NgramEmbedder, SentenceEncoder
from .huggingface import HuggingFaceModel, HuggingFaceTokenizer
from .learner import RewardLearner
from .policy import Completions, TokenPolicy, Tokens
from .rewards import Gate, TextEmbeddingReward, TextReward
from .rollouts import Sampling
from .texts import BytePairTokenizer, Pairs, Tokenizer, answer_tokens, prompt_tokens, read_pairs, read_text
from .trainer import Learning, SequenceStep, SequenceTrainer

__all__ = [
    "BytePairTokenizer", "CausalModel", "Completions", "Decoder", "EmbeddingPrecision", "Gate", "Head",
    "HuggingFaceModel", "HuggingFaceTokenizer", "Learning", "NgramEmbedder", "Pairs", "RewardLearner", "Sampling",
    "SentenceEncoder", "SequenceStep", "SequenceTrainer", "TextEmbeddingReward", "TextReward", "TokenPolicy",
    "Tokenizer", "Tokens", "answer_tokens", "embedding_precision", "marginal", "prompt_tokens", "read_pairs",
    "read_text", "residuals",
]  # fmt: skip
