"""Converts a published checkpoint: `python scripts/convert_checkpoint.py STATE_DICT.pt smallnorb OUTPUT`.

The state dicts of the original project (SST-2 root, SST-5 root, smallNORB) become directories that `from_pretrained`
loads. Nothing in the file is executed.
"""

import sys
from pathlib import Path

sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]  # has an evaluate.py

import argparse

from capsule_heads.cli.options import OneLineParser, fail
from capsule_heads.paper.convert import NETWORKS, convert_checkpoint


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("state_dict", help="file of the original project")
    parser.add_argument("network", choices=NETWORKS, help="which network it is of")
    parser.add_argument("output", help="directory to write")
    options = parser.parse_args()
    try:
        convert_checkpoint(options.state_dict, options.network, options.output)
    except (OSError, ValueError) as error:
        fail(error)
    print(f"Wrote {options.output}.")


if __name__ == "__main__":
    main()
