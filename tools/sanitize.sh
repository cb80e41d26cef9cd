#!/bin/sh
# Build the C++ kernels with the address and undefined-behaviour sanitizers in a copy of the tree
# and run their tests there. Usage: sanitize.sh PYTHON [pytest arguments]
set -eu
cd "$(dirname "$0")/.."
python=$PWD/$1
shift
copy=build/sanitize
compiler=${CXX:-c++}
if ! command -v "$compiler" >/dev/null; then
    echo "sanitize: failed: no C++ compiler ($compiler); run: sudo apt install g++" >&2
    exit 1
fi
mkdir -p "$copy"
cp -R -u mla tests tools benchmarks csrc setup.py pyproject.toml README.md LICENSE "$copy"
cd "$copy"
rm -f mla/_C.*
checks="-fsanitize=address,undefined -fno-sanitize-recover=undefined"
CFLAGS="$checks -g1" CXXFLAGS="$checks -g1" LDFLAGS="$checks" "$python" setup.py build_ext --inplace >build.log 2>&1 || true
if ! ls mla/_C.* >/dev/null 2>&1; then
    tail -n 20 build.log >&2
    echo "sanitize: failed: the extension did not build, see $copy/build.log" >&2
    exit 1
fi
libraries=""
for name in libasan.so libubsan.so libstdc++.so.6; do
    libraries="$libraries $("$compiler" -print-file-name=$name)"
done
# Python itself leaks on exit, by design.
LD_PRELOAD="$libraries" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
    "$python" -m pytest -q -n 0 -p no:cacheprovider --capture=sys \
    tests/test_cpp_*.py "$@"
