#!/usr/bin/env bash
# Runs the op tests on extensions built with sanitizers: all of them, and the CUDA kernels on the host, with
# AddressSanitizer and UndefinedBehaviorSanitizer, then those of threads with ThreadSanitizer.
# Usage: tests/sanitize.sh PYTHON [arguments of pytest]
set -euo pipefail
python=$(realpath -s "$1")
arguments=("${@:2}")
root=$(cd "$(dirname "$0")/.." && pwd)
work=$root/build/sanitize

build() { # NAME SANITIZERS
  "$python" -m pip install --quiet --no-deps --target "$work/$1" --upgrade "$root" \
    --config-settings=build-dir="$work/cmake-$1" \
    --config-settings=cmake.define.PO_KERNELS_SANITIZE="$2" \
    --config-settings=cmake.define.PO_KERNELS_CUDA=EMULATED
}

# Python itself is not instrumented: the runtime has to be there first, and its own allocations are not leaks. The
# instrumented package is imported before pytest puts the source tree, and the editable install its finder, before it.
run() { # NAME RUNTIME ARGUMENTS
  cd "$work"
  LD_PRELOAD="$(gcc -print-file-name="$2") $(gcc -print-file-name=libstdc++.so)" PO_KERNELS_POISON=1 \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=1" \
    "$python" -c '
import sys

site, *arguments = sys.argv[1:]
sys.meta_path[:] = [finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__]
sys.path.insert(0, site)
import po_kernels.extension

assert po_kernels.extension.module.__file__.startswith(site), po_kernels.extension.module
import pytest

sys.exit(pytest.main(arguments))
' "$work/$1" --rootdir "$root" --capture=no -p no:cacheprovider "${@:3}" ${arguments[@]+"${arguments[@]}"}
}

build address address,undefined
run address libasan.so "$root/tests/ops" -k "not numba and not triton and not cuda"
export PO_KERNELS_CUDA_EMULATE=1
run address libasan.so "$root/tests/ops/cuda_emulated.py"
unset PO_KERNELS_CUDA_EMULATE
build thread thread
# Torch's own threads are ignored with all that is not instrumented; of a process with threads no fork is watched.
run thread libtsan.so "$root/tests/ops" \
  -k "(native or network) and (threads or kept_graph or samples_do_not_depend) and not fork"
