#!/bin/sh
# All that is left to do for the CUDA kernels on a machine with a GPU: install, verify, test, sanitize, time. From the
# root of the tree; needs python3 with torch and pytest, and either a wheel or what `pip install .` needs.
#
#   bench/cuda_check.sh [WHEEL]      STEPS="install test" chooses some of: install verify test sanitize bench
#
# Every step leaves a log in $OUT, or in build/cuda_check without it. Exit code 1 if a step failed.
set -u
cd "$(dirname "$0")/.."
LOGS=${OUT:-build/cuda_check}
STEPS=${STEPS:-install verify test sanitize bench}
SITE=$PWD/build/cuda_check/site
PYTHON=${PYTHON:-python3}
WHEEL=${1:-$(ls dist/fastseq-*.whl 2>/dev/null | tail -n 1)}
mkdir -p "$LOGS" "$SITE"
export FASTSEQ_BUILD_CUDA=on FASTSEQ_CUDA=on PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"

# -P: the tree itself, which has no build, must not answer `import fastseq`.
install() {
  "$PYTHON" -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation --upgrade --target "$SITE" \
    "${WHEEL:-.}" && "$PYTHON" -P -c '
import torch
from fastseq.backends import cuda, select
print(torch.__version__, torch.cuda.get_device_name(), cuda.LIBRARY)
assert select("recurrent", "cuda") is cuda, cuda.why_off()'
}
verify() { "$PYTHON" -P -m fastseq info && "$PYTHON" -P -m fastseq verify --isa cuda; }
run_tests() { "$PYTHON" -P -m pytest -q -p no:cacheprovider tests/test_cuda_recurrent.py tests/test_cuda_attention.py; }
# Without torch's cache of memory every tensor is an allocation of its own, and a step beyond it is seen.
sanitize() {
  command -v compute-sanitizer >/dev/null || { echo 'compute-sanitizer is not installed'; return 1; }
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 1 --kernel-name kns=fastseq \
      "$PYTHON" -P -m pytest -q -p no:cacheprovider tests/test_cuda_recurrent.py \
      tests/test_cuda_attention.py -k 'test_odd_sizes' || return 1
  done
}
bench() {
  export PYTHONPATH="$PYTHONPATH:bench:tests"
  "$PYTHON" -P bench/bench_cuda_recurrent.py --seconds 0.1 --output "$LOGS/bench_recurrent.json" &&
    "$PYTHON" -P bench/bench_cuda_attention.py --seconds 0.1 --output "$LOGS/bench_attention.json"
}

failed=''
for step in $STEPS; do
  command=$step
  [ "$step" = test ] && command=run_tests
  if $command >"$LOGS/$step.log" 2>&1; then verdict=ok; else verdict=FAILED failed="$failed $step"; fi
  printf '%-9s %s\n' "$step" "$verdict"
  tail -n 4 "$LOGS/$step.log" | sed 's/^/    /'
done
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
