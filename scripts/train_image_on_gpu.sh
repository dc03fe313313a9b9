#!/usr/bin/env bash
# A small image model from noise to its record, on one GPU: trained, exported, judged. Its autoencoder and its text
# encoder's first weights are those of a model that ships.
#
#     bash scripts/train_image_on_gpu.sh FAMILY FROM OUT MINUTES
#     bash scripts/train_image_on_gpu.sh flux presets/models/tiny-sd3 OUT 18
#
# FAMILY is flux or sd3. OUT gets `shards`, written every two and a half minutes, `model`, a pipeline folder, and
# `quality/record.json`: 96 prompts, dense and at four keeps. Steps are captured as CUDA graphs; where that fails the
# rest of the time goes to steps that are not, and OUT/graphed.log says why. Judging takes two more minutes.
set -uo pipefail
[ $# = 4 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; }
family=$1 from=$2 out=$3 minutes=$4
cd "$(dirname "$0")/.."
mkdir -p "$out"
began=$SECONDS

train() { # MINUTES LOG OPTION...
  local last=$1 log=$2
  shift 2
  python3 scripts/train_tiny.py image-dit "$family" --out "$out/shards" --vae-from "$from" --text-from "$from" \
    --mix 256:24:0.4:4096 --mix 128:96:0.6:6144 --minutes "$last" "$@" >"$out/$log" 2>&1
}

if ! train "$minutes" graphed.log --graphed; then
  tail -n 3 "$out/graphed.log"
  left=$(python3 -c "print(round($minutes - ($SECONDS - $began) / 60, 2))")
  echo "steps cannot be captured; $left minutes without"
  train "$left" plain.log || { tail -n 3 "$out/plain.log"; exit 1; }
fi
python3 scripts/train_tiny.py image-export "$family" --run "$out/shards" --vae-from "$from" --to "$out/model" || exit 1
python3 scripts/evaluate_images.py --model "$out/model" --prompts 96 --batch 16 --judges 8 --device cuda:0 \
  --out "$out/quality"
