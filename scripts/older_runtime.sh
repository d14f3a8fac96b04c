#!/usr/bin/env bash
# An environment in the folder FOLDER with the oldest versions that read an exported folder: `scripts/older_runtime.sh FOLDER`.
set -euo pipefail
constraints=$(cd "$(dirname "$0")/.." && pwd)/constraints.txt
torch=$(mktemp)
grep -E '^(torch|numpy)==' "$constraints" >"$torch"

python3 -m venv "$1"
"$1/bin/pip" install -q -c "$torch" 'transformers==4.57.*' 'sentence-transformers==5.1.*'
