#!/usr/bin/env bash
# All benchmarks of a GPU in one call of under 10 minutes, offline: training (T3 with TRL and QLoRA, then T1 and T2), then
# self-generation. Results go to OUT (default bench/results). The DeepSpeed wheel of constraints.txt must be installed.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1
OUT=${OUT:-bench/results}
limit() { timeout "$@" || echo "{\"not measured\": \"ended after $1 s, or failed\"}"; }
limit 240 python -m ssgen_ds bench train --rows T3 --json >"$OUT/gpu-T3.json"
limit 180 python -m ssgen_ds bench train --rows T1,T2 --json >"$OUT/gpu-T1-T2.json"
limit 150 python -m ssgen_ds bench selfgen --rows S1,S3 --json >"$OUT/gpu-selfgen.json"
