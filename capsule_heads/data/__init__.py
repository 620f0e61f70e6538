"""Data: the Stanford Sentiment Treebank, GLUE, embedded reviews, images, and their preparation."""

from .glue import load_glue
from .hidden_states import CapsuleCollator, HiddenStateCache
from .reviews import load_reviews
from .sst import load_sst
from .tokenization import tokenize, window_fields

__all__ = [
    "CapsuleCollator",
    "HiddenStateCache",
    "load_glue",
    "load_reviews",
    "load_sst",
    "tokenize",
    "window_fields",
]
