#!/usr/bin/env bash
# Builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer and runs the op tests on it.
# Usage: tests/sanitize.sh PYTHON
set -euo pipefail
python=$(realpath -s "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
work=$root/build/sanitize
site=$work/site

"$python" -m pip install --quiet --no-deps --target "$site" --upgrade "$root" \
  --config-settings=build-dir="$work/cmake" \
  --config-settings=cmake.define.PO_KERNELS_SANITIZE=address,undefined \
  --config-settings=cmake.define.PO_KERNELS_CUDA=OFF

# Python itself is not instrumented: the runtime has to be there first, and its own allocations are not leaks. The
# instrumented package is imported before pytest puts the source tree, and the editable install its finder, before it.
cd "$work"
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so)" \
ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PO_KERNELS_POISON=1 \
  "$python" -c '
import sys

site, *arguments = sys.argv[1:]
sys.meta_path[:] = [finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__]
sys.path.insert(0, site)
import po_kernels.extension

assert po_kernels.extension.module.__file__.startswith(site), po_kernels.extension.module
import pytest

sys.exit(pytest.main(arguments))
' "$site" "$root/tests/ops" --rootdir "$root" -p no:cacheprovider -k "not numba and not triton" "${@:2}"
