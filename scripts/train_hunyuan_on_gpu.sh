#!/usr/bin/env bash
# tiny-hunyuan from noise to its record, on one GPU: autoencoder, and beside it the text encoder; transformer, guidance built
# in, exported, judged.
#
#     bash scripts/train_hunyuan_on_gpu.sh OUT CODE PLAIN GUIDED
#     bash scripts/train_hunyuan_on_gpu.sh OUT 6 9 5
#
# CODE, PLAIN and GUIDED are minutes, of the autoencoder and of the two runs of the transformer. OUT gets `code`, `text`,
# `plain` and `guided`, shards with their records, `model`, a pipeline folder, and `quality/record.json`: 64 prompts, dense
# and at four keeps. Steps of the transformer are captured as CUDA graphs; where that fails the rest of the time goes to
# steps that are not, and a log says why. What is in OUT already, of a run that broke off, is not made again.
set -uo pipefail
[ $# = 4 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; }
out=$1 code=$2 plain=$3 guided=$4
cd "$(dirname "$0")/.."
mkdir -p "$out"

stage() { # COMMAND FOLDER MINUTES OPTION...
  local command=$1 folder=$2 last=$3
  shift 3
  python3 scripts/train_tiny.py "$command" --out "$out/$folder" --minutes "$last" "$@"
}

transformer() { # FOLDER MINUTES OPTION...
  local folder=$1 last=$2 began=$SECONDS left
  shift 2
  [ -e "$out/$folder/dit.json" ] && return
  stage hunyuan-dit "$folder" "$last" --vae-from "$out/code" "$@" --graphed >"$out/$folder-graphed.log" 2>&1 && return
  tail -n 3 "$out/$folder-graphed.log"
  left=$(python3 -c "print(round($last - ($SECONDS - $began) / 60, 2))")
  echo "steps cannot be captured; $left minutes without"
  stage hunyuan-dit "$folder" "$left" --vae-from "$out/code" "$@" >"$out/$folder-plain.log" 2>&1 && return
  tail -n 3 "$out/$folder-plain.log"
  exit 1
}

words=
if [ ! -e "$out/text/text.json" ]; then
  stage video-text text 1.5 --device cuda >"$out/text.log" 2>&1 & # it waits for captions more than for the GPU
  words=$!
fi
if [ ! -e "$out/code/vae.json" ]; then
  stage video-vae code "$code" >"$out/code.log" 2>&1 || { tail -n 3 "$out/code.log"; exit 1; }
fi
if [ -n "$words" ]; then wait "$words" || { tail -n 3 "$out/text.log"; exit 1; }; fi
transformer plain "$plain" --text-from "$out/text"
transformer guided "$guided" --resume "$out/plain" --guide-from "$out/plain"
python3 scripts/train_tiny.py hunyuan-export --run "$out/guided" --vae-from "$out/code" --to "$out/model" || exit 1
python3 scripts/evaluate_quality.py --model "$out/model" --preset tiny-hunyuan-pooled \
  --variants dense min_tokens=0 keep=0.5,min_tokens=0 keep=0.25,min_tokens=0 keep=0.1,min_tokens=0 --prompts 64 --batch 16 --judges 8 --device cuda:0 --out "$out/quality"
