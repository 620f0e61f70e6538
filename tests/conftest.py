"""What all tests share, set before torch or anything of Hugging Face is imported: no network, and the same bits."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test may wait for a hub
# Otherwise MKL's products differ in the last bit by where in memory the weights are, and loaded ones are elsewhere.
os.environ["MKL_CBWR"] = "AUTO"
