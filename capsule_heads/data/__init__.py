"""Data: the Stanford Sentiment Treebank, GLUE, smallNORB, embedded stand-ins for them, and their preparation."""

from .glue import load_glue
from .hidden_states import CapsuleCollator, HiddenStateCache
from .reviews import load_reviews
from .smallnorb import load_smallnorb
from .sst import load_sst
from .stereo import prepare_stereo
from .tokenization import tokenize, window_fields
from .toy_norb import load_toy_norb

__all__ = [
    "CapsuleCollator",
    "HiddenStateCache",
    "load_glue",
    "load_reviews",
    "load_smallnorb",
    "load_sst",
    "load_toy_norb",
    "prepare_stereo",
    "tokenize",
    "window_fields",
]
