#!/usr/bin/env bash
# Installs the lowest versions that pyproject.toml allows, together, in a virtual environment of their own, and runs the
# tests of the models, of routing and of the installed package there, on all cores. Arguments go to pytest instead.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# -eq 0 ]; then
  # Without the kernels in Triton's interpreter and the comparisons of all strategies, which need long and know torch
  # alone: the newest versions run them.
  set -- --numprocesses=auto --dist=loadfile tests/test_versions.py tests/test_layers.py tests/models tests/ops \
    --ignore tests/ops/test_cuda.py --ignore tests/ops/test_strategies.py tests/cli/test_wheel.py tests/cli/test_demo.py \
    --deselect tests/cli/test_wheel.py::test_the_quickstart_elsewhere
fi
venv=${VENV:-.venv-minimums}
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet uv
"$venv/bin/uv" pip compile --quiet --python "$venv/bin/python" --resolution lowest-direct --only-binary :all: \
  --extra test pyproject.toml --output-file "$venv/lowest.txt"
"$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --requirements "$venv/lowest.txt" --editable .
HF_HUB_OFFLINE=1 "$venv/bin/python" -m pytest "$@"
