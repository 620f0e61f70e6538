#!/usr/bin/env bash
# Installs the package with its test extra in a virtual environment of its own and runs all tests, on all cores. Arguments
# go to pytest instead. Without arguments it also runs the tests marked `gpu`, where torch finds a CUDA device.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv-test}
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --editable ".[test]"
if [ $# -gt 0 ]; then
  HF_HUB_OFFLINE=1 exec "$venv/bin/python" -m pytest "$@"
fi
# The tests of a file stay in one process: they share what took long to make, such as a trained model.
HF_HUB_OFFLINE=1 "$venv/bin/python" -m pytest --numprocesses=auto --dist=loadfile
if "$venv/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  HF_HUB_OFFLINE=1 "$venv/bin/python" -m pytest -m gpu
fi
