#!/usr/bin/env bash
# Runs ruff, then the tests. `bash tests/run.sh` leaves the slow ones out, `all` runs them too;
# other arguments go to pytest.
set -euo pipefail
unset CDPATH # cd would look there, and print where it went
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source common/setup.sh
setup_python tests/requirements.txt
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
if [ "${1:-}" != all ]; then
    exec "$PYTHON" -m pytest "$@"
fi
shift
"$PYTHON" -m pytest "$@"
# One after the other and with all cores: some of the slow ones wait for a time or use all memory.
cores=$(getconf _NPROCESSORS_ONLN)
exec env OMP_NUM_THREADS="$cores" "$PYTHON" -m pytest -m slow -n 0 "$@"
