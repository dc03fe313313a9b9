#!/usr/bin/env bash
# What a tiny-wan gains and costs on this machine's GPUs: prompt accuracy and distance from dense at both grids, the
# kernels' correctness and speed, the autoencoder. The records land in OUT, ready for scripts/results.
#
#     bash scripts/measure_on_gpus.sh presets/models/tiny-wan OUT
#
# The prompts are shared out over all GPUs. About four minutes on four H200; nothing is printed for a step that fails
# but the end of its log, and the exit status is 1.
set -uo pipefail
[ $# = 2 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; }
model=$1 out=$2
cd "$(dirname "$0")/.."
mkdir -p "$out/logs"
gpus=$(nvidia-smi -L | wc -l)
failed=0

# Below the size from which sparse attention pays a preset would run dense: min_tokens=0 asks for it all the same.
fast=fast,min_tokens=0 random=random,min_tokens=0
default=(dense "$fast" "$random" "$fast,keep=0.25" "$random,keep=0.25" "$random,neighbours=0" dense,kernel=math dense,steps=14 dense,steps=30
  dense,guidance=3 dense,guidance=7)
large=(dense fast,keep=0.5 fast,keep=0.25 fast,keep=0.1 random,keep=0.25)

evaluate() { # NAME GRID PROMPTS BATCH VARIANT...
  local name=$1 grid=$2 prompts=$3 batch=$4 gpu pids=()
  shift 4
  for ((gpu = 0; gpu < gpus; gpu++)); do
    CUDA_VISIBLE_DEVICES=$gpu python3 scripts/evaluate_quality.py --model "$model" --grid "$grid" --prompts "$prompts" \
      --batch "$batch" --show 2 --out "$out/parts/$name" --shard "$gpu/$gpus" --variants "$@" \
      >"$out/logs/$name-$gpu.log" 2>&1 &
    pids+=($!)
  done
  for ((gpu = 0; gpu < gpus; gpu++)); do
    wait "${pids[gpu]}" || { failed=1; tail -n 5 "$out/logs/$name-$gpu.log"; }
  done
  python3 scripts/evaluate_quality.py --merge "$out/parts/$name"/record-*of"$gpus".json --out "$out/parts/$name" \
    2>&1 | tee "$out/logs/$name.txt" || failed=1
  mv "$out/parts/$name/record.json" "$out/tiny_wan_${name}_gpu.json" || failed=1
}

alone() { # LINES NAME COMMAND...: one after another on the first GPU, timed undisturbed
  local lines=$1 name=$2
  shift 2
  local code=0
  CUDA_VISIBLE_DEVICES=0 timeout 300 python3 "$@" >"$out/logs/$name.txt" 2>&1 || code=$?
  tail -n "$lines" "$out/logs/$name.txt"
  [ "$code" = 0 ] || failed=1
  return "$code"
}

evaluate default default 64 16 "${default[@]}"
evaluate large large 8 1 "${large[@]}"
alone 3 check_kernels scripts/check_kernels.py --output "$out/check_kernels.json"
alone 8 measure_judge scripts/measure_judge.py --clips 96 --only vae --vae "$model/vae" --device cuda \
  --json "$out/judge_vae.json"
alone 40 bench_kernels scripts/bench_kernels.py --impl triton hopper --output "$out/bench_kernels.json"
exit "$failed"
