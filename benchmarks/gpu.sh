#!/usr/bin/env bash
# All that a GPU is needed for: build in place, the op tests on the device, compute-sanitizer, benchmarks.
#
#   benchmarks/gpu.sh            on a machine with an NVIDIA GPU; uses its torch and triton, and no network
#   benchmarks/gpu.sh --dry-run  what of it can run without a GPU: the state, some tests, the benchmark of tiny shapes
#
# Environment: PYTHON (python3), OUT (gpu-results), BUDGET (seconds in all, 460). Writes $OUT/*.log, the ratios to
# benchmarks/results/DEVICE.json, or into $OUT without a GPU, and for which shapes the package is to choose CUDA C++ over
# Triton (po_kernels/backends/cuda/measured.json). What there was no time for is named, and the exit status is then 1.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
out=${OUT:-gpu-results}
end=$((SECONDS + ${BUDGET:-460}))
device=cuda
[[ ${1:-} == --dry-run ]] && device=cpu
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 CUBLAS_WORKSPACE_CONFIG=:4096:8
failed=0

# step NAME SECONDS COMMAND...: runs it within its limit and what is left in all, and goes on when it fails.
step() {
  local name=$1 limit=$2 left=$((end - SECONDS))
  shift 2
  ((limit > left)) && limit=$left
  if ((limit < 5)); then
    echo "== $name: no time left"
    failed=1
    return
  fi
  echo "== $name (at most ${limit} s)"
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  local status=$?
  tail -n 4 "$out/$name.log"
  ((status == 0)) || { echo "== $name: exit status $status, see $out/$name.log"; failed=1; }
}

export PYTHONPATH=$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}
if [[ $device == cuda ]]; then
  mkdir -p benchmarks/results
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/device.csv"
  if "$python" -c 'import scikit_build_core, pybind11' 2>/dev/null; then
    step build 180 "$python" -m pip install --no-build-isolation --no-deps --no-index -e .
  else
    echo "== build: scikit-build-core or pybind11 is missing; the Python sources run as they are"
  fi
fi
step status 30 "$python" -m po_kernels

if [[ $device == cuda ]]; then
  # Triton compiles what is measured while the first tests run.
  timeout "$((end - SECONDS < 160 ? 5 : 120))" "$python" -m benchmarks.bench_gpu --compile >"$out/compile.log" 2>&1 &
  compiling=$!
  # Compiling takes most of the tests' time too.
  parallel=()
  "$python" -c 'import xdist' 2>/dev/null && parallel=(-n "$(($(nproc) < 12 ? $(nproc) : 12))" --dist worksteal)
  run=("$python" -m pytest -q -p no:cacheprovider -W ignore "${parallel[@]}")
  select="not fork and not threads and not numba and not native"
  suite=(tests/ops/test_{contract,derivatives,numbers,philox,token,token_pitfalls}.py)
  step cuda 100 "${run[@]}" --device cuda -k "cuda and not host and $select" "${suite[@]}" tests/ops/test_cuda.py
  wait "$compiling" || { echo "== compile: exit status $?, see $out/compile.log"; failed=1; }
  step bench 200 "$python" -m benchmarks.bench_gpu --seconds 0.4 --renew --out benchmarks/results
  step figure3 60 "${run[@]}" tests/po_bilevel/test_gaussian.py -k device
  step tests 200 "${run[@]}" --device cuda -k "not cuda and $select" "${suite[@]}"
  if command -v compute-sanitizer >/dev/null; then
    step once 60 "$python" -m benchmarks.bench_gpu --once --compile
    for tool in memcheck racecheck; do
      step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m benchmarks.bench_gpu --once
    done
  else
    echo "== compute-sanitizer: not on this machine"
  fi
else
  step tests 120 "$python" -m pytest -q -p no:cacheprovider --device cpu tests/ops/test_philox.py -k "known or seeds"
  step bench 120 "$python" -m benchmarks.bench_gpu --device cpu --out "$out/gpu.json"
fi
exit $failed
