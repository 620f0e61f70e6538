#!/usr/bin/env bash
# Installs the package with its test extra in a virtual environment of its own and runs all tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv-test}
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --editable ".[test]"
HF_HUB_OFFLINE=1 "$venv/bin/python" -m pytest "$@"
