#!/bin/sh
# Measures the trainer on a GPU (tests/bench/bench_gpu.py): in .venv if there is one, else, without a network,
# with the wheels of .gpu-bundle and the machine's own Python and torch. Results: runs/gpu-check, or $OUT.
set -eu
cd "$(dirname "$0")/.."
python="${GPU_PYTHON:-python3}"
if [ -x .venv/bin/python ]; then
	python=.venv/bin/python
elif [ -d .gpu-bundle ]; then
	site="$(mktemp -d)"
	trap 'rm -rf "$site"' EXIT
	"$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
		--target "$site" .gpu-bundle/*.whl
	export PYTHONPATH="$site:crds:runtime:operator"
else
	echo "there is neither .venv nor .gpu-bundle: run make gpu-bundle where there is a network, and carry it here" >&2
	exit 64
fi
"$python" tests/bench/bench_gpu.py --out "${OUT:-runs/gpu-check}" "$@"
