#!/usr/bin/env bash
# What a GPU can tell, offline, on a machine with torch for CUDA and the packages of pyproject.toml.
#   bench/gpu.sh       one process of under 10 minutes; a line of JSON after each item, in OUT/gpu.jsonl
#   bench/gpu.sh trl   LoRA and QLoRA beside TRL (row T3), which needs the extras bench and qlora; in OUT/gpu-trl.json
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1
OUT=${OUT:-bench/results}
case "${1:-all}" in
  all) timeout 590 python -m bench.gpu "$OUT/gpu.jsonl" ;;
  trl) timeout 590 python -m ssgen_ds bench train --rows T3 --json >"$OUT/gpu-trl.json" ;;
  *) echo "usage: bench/gpu.sh [trl]" >&2; exit 2 ;;
esac
