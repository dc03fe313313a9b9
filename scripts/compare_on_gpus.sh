#!/usr/bin/env bash
# The comparison of methods on all GPUs of this machine, one grid at a time; the records land in OUT.
#
#     bash scripts/compare_on_gpus.sh MODEL OUT SECONDS GRID [OPTION...]
#     bash scripts/compare_on_gpus.sh presets/models/tiny-wan out 560 large --prompts 16 --batch 4 --keeps .25 .15 .1 --methods all
#     bash scripts/compare_on_gpus.sh presets/models/tiny-wan out 280 default --prompts 16 --batch 16 --methods all
#
# No variant is begun that would end after SECONDS. Shards share the processor's cores: each gets its part, or small
# operations of one would keep the others waiting. To plan with, on an H200 and 16 prompts: a variant of 33,792 tokens
# takes about 26 s of a GPU, one of 4,352 tokens 9 s, controls count as variants, and a shard takes 40 s until it begins
# (as seen, in no record). What earlier records hold is not run again: --beside RECORD... Runs that differ in methods or
# keeps alone can be merged: python scripts/bench_methods.py --merge OUT/*/record-*.json --out OUT
set -uo pipefail
[ $# -ge 4 ] || { sed -n '2,12p' "$0" | sed 's/^# \{0,1\}//'; exit 2; }
model=$1 out=$2 seconds=$3 grid=$4
shift 4
cd "$(dirname "$0")/.."
gpus=$(nvidia-smi -L | wc -l)
cores=$(($(nproc) / gpus))
mkdir -p "$out/$grid"
pids=()
for ((gpu = 0; gpu < gpus; gpu++)); do
  CUDA_VISIBLE_DEVICES=$gpu OMP_NUM_THREADS=$((cores > 4 ? cores / 2 : 1)) timeout $((seconds + 30)) \
    python3 scripts/bench_methods.py --model "$model" --grid "$grid" --shard "$gpu/$gpus" --seconds "$seconds" \
    --judges $((cores > 4 ? cores - 4 : 1)) --out "$out/$grid" "$@" >"$out/$grid/$gpu.log" 2>&1 &
  pids+=($!)
done
failed=0
for ((gpu = 0; gpu < gpus; gpu++)); do
  wait "${pids[gpu]}" || { failed=1; tail -n 5 "$out/$grid/$gpu.log"; }
done
python3 scripts/bench_methods.py --merge "$out/$grid"/record-*of"$gpus".json --out "$out/$grid" | tail -n 150
exit "$failed"
