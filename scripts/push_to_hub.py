"""Pushes a run to the Hub: `python scripts/push_to_hub.py runs/sst5_minilm_0 me/sst5-capsules --include_code`.

The model, its tokenizer and results.json, with a model card, in one commit. Prints the commit's address.
"""

import sys
from pathlib import Path

sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]  # has an evaluate.py

import argparse

from capsule_heads.cli.options import OneLineParser, fail
from capsule_heads.hub import push_run


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="output_dir of scripts/train.py, or another directory with a model")
    parser.add_argument("repo_id", help='name of the repository, "name" or "owner/name"; made if there is none')
    parser.add_argument("--include_code", action="store_true", help="so that it runs without this package, if trusted")
    parser.add_argument("--private", action="store_true", help="make the repository a private one, if it is made")
    parser.add_argument("--license", help="identifier of the model's licence, such as mit")
    parser.add_argument("--language", help="ISO 639 code of the language of its texts, such as en")
    parser.add_argument("--commit_message", default="Upload model")
    options = vars(parser.parse_args())
    options["private"] = options["private"] or None  # else the owner's default
    try:
        commit = push_run(**options)
    except (OSError, TypeError, ValueError) as error:
        fail(error)
    print(commit.commit_url)


if __name__ == "__main__":
    main()
