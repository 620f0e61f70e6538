"""What all tests share: no network, and what pytest is told before anything of Hugging Face is imported."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test may wait for a hub
