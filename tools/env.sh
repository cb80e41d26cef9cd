#!/bin/sh
# Find a Python that can run the package and hand over to env.py, which makes .venv.
# Usage: env.sh [PYTHON]    the interpreter to use; without it the one of .venv or the first that fits
set -eu
cd "$(dirname "$0")/.."

fits() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

if [ -n "${1-}" ]; then
    if fits "$1"; then
        exec "$1" tools/env.py
    fi
    echo "env: failed: PYTHON=$1 is not a Python 3.10 or newer; leave PYTHON out or run: sudo apt install python3.11 python3.11-venv" >&2
    exit 1
fi
for candidate in .venv/bin/python python3.11 python3.12 python3.13 python3.10 python3 python; do
    if fits "$candidate"; then
        exec "$candidate" tools/env.py
    fi
done
echo "env: failed: no Python 3.10 or newer was found; run: sudo apt install python3.11 python3.11-venv" >&2
exit 1
