#!/usr/bin/env bash
# tiny-wan fine-tuned for sparse-linear attention, and what it is worth, on one GPU.
#
#     bash scripts/train_sla_on_gpu.sh OUT MINUTES [OPTION...]
#     bash scripts/train_sla_on_gpu.sh OUT 17 --batch 24 --steps 624
#
# OPTIONs are those of `finetune_sla.py train`. OUT gets `sla`, the weights and the record of the training; `velocity.json`,
# errors on unseen scenes before and after; and `quality/record.json`, 96 prompts: dense, top-k at the same keep and blocks,
# and what was trained, both with one plan for both branches and with four, six or eight of 20 steps dense. What is in OUT
# already, of a run that broke off, is not made again.
set -uo pipefail
[ $# -ge 2 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }
out=$1 minutes=$2
shift 2
cd "$(dirname "$0")/.."
mkdir -p "$out"
keep=0.1 block=32 above=0.96 # the steps above that noise level stay dense, and are not trained

sla() { python3 scripts/finetune_sla.py "$@"; }

for rank in 0 1 2 3 4 5; do # drawing scenes is what takes long
  RANK=$rank WORLD_SIZE=6 OMP_NUM_THREADS=2 sla latents --scenes rendered --count 512 --out "$out/lat" &
  drawing[rank]=$!
done
for rank in 0 1 2 3 4 5; do wait "${drawing[rank]}" || exit 1; done
sla latents --scenes rendered --first 1000000 --count 8 --out "$out/unseen" || exit 1
if [ ! -e "$out/sla/transformer.safetensors" ]; then
  sla train --latents "$out/lat" --out "$out/sla" --minutes "$minutes" --keep "$keep" --block "$block" --order packed \
    --mix --trains lora --rank 32 --rate 1e-3 --below "$above" "$@" || exit 1
fi
sla evaluate --latents "$out/unseen" --count 8 --sla "$out/sla" --shared-plans --below "$above" \
  --out "$out/velocity.json" || exit 1
variants=(dense)
for dense_above in "$above" 0.93 0.9; do
  same="keep=$keep,dense_above=$dense_above,share_plans=true,min_tokens=0"
  variants+=("fast,order=packed,block=$block,neighbours=0,$same" "fast,method=sla,weights=$out/sla,$same")
done
python3 scripts/evaluate_quality.py --model presets/models/tiny-wan --device cuda:0 --prompts 96 --batch 16 --judges 8 \
  --variants "${variants[@]}" --out "$out/quality"
