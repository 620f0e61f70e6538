"""Train a capsule head under `accelerate launch scripts/train.py`: the options of `capsule-heads train`."""

import sys

from capsule_heads.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
