#!/usr/bin/env bash
# Fetch what a GPU machine without a network lacks, for `run.sh`: bash tests/gpu/wheels.sh [FOLDER]
#
# Such a machine has torch and its own CUDA, numpy, pandas, pyarrow, matplotlib and pytest. PYTHON_VERSION is the
# version of its Python, 3.12 by default.
set -euo pipefail
cd "$(dirname "$0")"
folder=${1:-wheels}
version=${PYTHON_VERSION:-3.12}
most=$((55 * 1024 * 1024))

rm -rf "$folder" && mkdir -p "$folder"
fetch() {
    local platforms=() number
    for number in 17 24 26 27 28 31 34 35; do platforms+=(--platform "manylinux_2_${number}_x86_64"); done
    python3 -m pip download -q --only-binary=:all: --python-version "$version" --implementation cp \
        --platform manylinux2014_x86_64 --platform manylinux1_x86_64 "${platforms[@]}" -d "$folder" "$@"
}
# With what they need, which is small.
fetch "huggingface-hub>=2.4,<3" "typer>=0.26,<1" "fastapi>=0.160" "uvicorn>=0.50" "fsspec<=2026.9.0"
# Without what they need: torch, numpy and pyarrow are there.
fetch --no-deps "transformers>=5.24,<6" "tokenizers>=0.23.1,<0.24" "safetensors>=0.8" "regex>=2025.10.22" \
    "datasets>=5,<6" "dill<0.4.2" "multiprocess<0.70.20" xxhash "evaluate>=0.4.6,<0.5" \
    "accelerate>=1.15,<2" "peft>=0.21,<0.22" "psutil>=5.9" "filelock>=3.30" "jinja2>=3.1" markupsafe requests \
    "bitsandbytes>=0.50"

# bitsandbytes brings a library for every CUDA since 11.8, and for other makers' GPUs. torch's CUDA there is 13.
python3 - "$folder" <<'PYTHON'
import re
import sys
import zipfile
from pathlib import Path

for wheel in Path(sys.argv[1]).glob("bitsandbytes-*.whl"):
    other = re.compile(r"libbitsandbytes_(?!cuda13|cpu)\w+\.(so|dll)")
    small = wheel.with_suffix(".small")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            if not other.search(name):
                content = old.read(name)
                if name.endswith("RECORD"):
                    content = b"".join(line for line in content.splitlines(True) if not other.search(line.decode()))
                new.writestr(name, content)
    small.replace(wheel)
PYTHON

size=$(du -cb "$folder"/*.whl | tail -1 | cut -f1)
echo "$(ls "$folder"/*.whl | wc -l) wheels for Python $version, $((size / 1024 / 1024)) MiB, in $(realpath "$folder")"
if [ "$size" -gt "$most" ]; then
    echo "that is more than $((most / 1024 / 1024)) MiB: leave something out" >&2
    exit 1
fi
