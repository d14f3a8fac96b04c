#!/usr/bin/env bash
# The tests, in an environment of their own, .venv-dev; no network, no GPU. Options are those of pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

python3 -m venv .venv-dev
.venv-dev/bin/pip install -q -c constraints.txt -e '.[dev]'
.venv-dev/bin/python -m pytest -n auto --dist worksteal "$@"
