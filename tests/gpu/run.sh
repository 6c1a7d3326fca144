#!/usr/bin/env bash
# The GPU tests and the benchmark, on a machine without a network: bash tests/gpu/run.sh
#
# It installs the wheels that `wheels.sh` fetched into a virtual environment over the machine's own torch, and takes
# at most eight minutes. Logs go to $OUT, here by default. HFKIT_GPU_DRY=1 runs it on a CPU at tiny sizes; PYTHON
# names the Python that has torch, TESTS_SECONDS and BENCHMARK_SECONDS the time for each part.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=$(realpath "${OUT:-.}")
python=${PYTHON:-python3}
wheels=${WHEELS:-tests/gpu/wheels}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # deterministic kernels, which some tests ask for

step() { echo "== $* ($(date +%T))"; }

step "installing from $wheels"
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
"$python" -m venv --without-pip "$work/venv" || exit 1
site=$(echo "$work"/venv/lib/python*/site-packages)
# Not --system-site-packages: where the machine's Python is itself a virtual environment, that would pass it over.
"$python" - >"$site/machine.pth" <<'PYTHON'
import importlib.util
import pathlib
import sys

folder = pathlib.Path(importlib.util.find_spec("torch").origin).parents[1]
print(folder, *[path for path in sys.path if path.endswith(("-packages")) and path != str(folder)], sep="\n")
PYTHON
"$python" -m pip install -q --no-index --no-deps --no-compile --no-warn-script-location --disable-pip-version-check \
    --root-user-action=ignore --target "$site" "$wheels"/*.whl ||
    for wheel in "$wheels"/*.whl; do "$python" -m zipfile -e "$wheel" "$site"; done
# hfkit itself is this folder, with the name and version that an installed package has.
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' hfkit/__init__.py)
mkdir "$site/hfkit-$version.dist-info"
printf 'Metadata-Version: 2.1\nName: hfkit\nVersion: %s\n' "$version" >"$site/hfkit-$version.dist-info/METADATA"
python=$work/venv/bin/python
"$python" - <<'PYTHON' || exit 1
import importlib.metadata as metadata
import sys

import torch

names = "torch transformers accelerate datasets peft huggingface-hub tokenizers numpy pyarrow bitsandbytes pytest".split()
found = {distribution.name.lower().replace("_", "-") for distribution in metadata.distributions()}
print("Python", sys.version.split()[0], *[f"{n} {metadata.version(n) if n in found else 'missing'}" for n in names], sep=", ")
print("GPU:", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
PYTHON

step "tests"
timeout -k 10 "${TESTS_SECONDS:-230}" "$python" -m pytest tests/gpu -m gpu -n0 -p no:cacheprovider -v -rs --tb=short \
    --durations=10 2>&1 | tee "$out/gpu-tests.txt"
tests=${PIPESTATUS[0]}

step "benchmark"
dry=()
[ "${HFKIT_GPU_DRY:-}" = 1 ] && dry=(--dry)
seconds=${BENCHMARK_SECONDS:-230}
timeout -k 10 "$seconds" "$python" tests/benchmarks/gpu.py --seconds $((seconds - 70)) --json "$out/gpu-benchmark.json" \
    "${dry[@]}" 2>&1 | tee "$out/gpu-benchmark.txt"
benchmark=${PIPESTATUS[0]}

step "summary"
grep -E "^(FAILED|ERROR|SKIPPED)|^=+ .*(passed|failed|error)" "$out/gpu-tests.txt" | cut -c1-300
# The table; where time ran out before it, the rows.
tac "$out/gpu-benchmark.txt" | sed '/^| what/q' | tac | grep "^|"
echo "tests ended with $tests, the benchmark with $benchmark (124: out of time)"
[ "$tests" = 0 ] && [ "$benchmark" = 0 ]
