"""Data: your own, the Stanford Sentiment Treebank, GLUE, embedded reviews, images, audio, and their preparation.

Names are imported when they are first used, and `datasets` when data is loaded.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .audio import AudioCollator, load_audio_folder, open_audio, prepare_audio
    from .glue import load_glue
    from .hidden_states import CapsuleCollator, HiddenStateCache
    from .images import load_images, open_image, prepare_images
    from .own import OwnData, load_data, load_examples
    from .reviews import load_reviews
    from .sst import load_sst
    from .tokenization import tokenize, window_fields

__all__ = [
    "AudioCollator",
    "CapsuleCollator",
    "HiddenStateCache",
    "OwnData",
    "load_audio_folder",
    "load_data",
    "load_examples",
    "load_glue",
    "load_images",
    "load_reviews",
    "load_sst",
    "open_audio",
    "open_image",
    "prepare_audio",
    "prepare_images",
    "tokenize",
    "window_fields",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        **dict.fromkeys(("AudioCollator", "load_audio_folder", "open_audio", "prepare_audio"), "audio"),
        **dict.fromkeys(("CapsuleCollator", "HiddenStateCache"), "hidden_states"),
        **dict.fromkeys(("load_images", "open_image", "prepare_images"), "images"),
        **dict.fromkeys(("OwnData", "load_data", "load_examples"), "own"),
        **dict.fromkeys(("tokenize", "window_fields"), "tokenization"),
        **{f"load_{name}": name for name in ("glue", "reviews", "sst")},
    },
)
