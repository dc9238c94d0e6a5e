#!/usr/bin/env bash
# Runs ruff, then the tests. `bash tests/run.sh` leaves the slow ones out, `all` runs them too;
# other arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source common/setup.sh
setup_python tests/requirements.txt
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
if [ "${1:-}" = all ]; then
    shift
    exec "$PYTHON" -m pytest -m "" "$@"
fi
exec "$PYTHON" -m pytest "$@"
