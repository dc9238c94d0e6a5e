# Sourced by train.sh and tests/run.sh: sets PYTHON to an interpreter that has the packages of the
# given requirements file. In an active virtual environment that one is used, else .venv is made.
# Installs only when the requirements have changed since the last time.
setup_python() {
    local root requirements wanted stamp
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    requirements=$root/$1
    if [ -n "${VIRTUAL_ENV:-}" ]; then
        PYTHON=$VIRTUAL_ENV/bin/python
    else
        PYTHON=$root/.venv/bin/python
        if [ ! -x "$PYTHON" ]; then
            echo "making .venv with $(python3 --version)" >&2
            if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
                echo "error: Python 3.11 or later is needed" >&2
                exit 2
            fi
            python3 -m venv "$root/.venv"
        fi
    fi
    stamp=$("$PYTHON" -c 'import sys; print(sys.prefix)')/installed-$(basename "$(dirname "$requirements")")
    wanted=$(cat "$root"/requirements.txt "$root"/*/requirements.txt)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing $1 into $("$PYTHON" -c 'import sys; print(sys.prefix)')" >&2
        # uv's environments have no pip, nor one that Debian left unfinished without python3-venv.
        "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip >/dev/null
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$requirements" >&2
        { printf '%s\n' "$wanted" >"$stamp"; } 2>/dev/null || true # it may be read-only, and whole
    fi
    export PYTHON
}
