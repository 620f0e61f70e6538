"""Data: the Stanford Sentiment Treebank, GLUE, the embedded reviews, and their preparation."""

from .glue import load_glue
from .hidden_states import CapsuleCollator, cache_hidden_states
from .reviews import load_reviews
from .sst import load_sst
from .tokenization import tokenize

__all__ = ["CapsuleCollator", "cache_hidden_states", "load_glue", "load_reviews", "load_sst", "tokenize"]
