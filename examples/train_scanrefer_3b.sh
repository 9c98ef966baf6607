#!/usr/bin/env bash
# Train and evaluate ScanRefer with Qwen2.5-VL-3B and VGGT-1B on the GPUs of this machine.
#   bash examples/train_scanrefer_3b.sh [DATA_ROOT] [OUT]
# DATA_ROOT holds ScanNet and ScanRefer (docs/guides/own-dataset.md). Set DRY_RUN=1 to print the commands only.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

root=${1:-data/scannet}
out=${2:-runs/scanrefer_3b}

run() {
    printf '+ %s\n' "$*"
    if [ -z "${DRY_RUN:-}" ]; then "$@"; fi
}

run python launchers/doctor.py
run python launchers/prepare.py scanrefer --root "$root" --frames.count 24
# ZeRO-2, because the weights of 3B fit on a GPU. The same command continues an interrupted run.
run deepspeed launchers/train.py --deepspeed ds_configs/zero2.json --config w2r2_ds/recipes/scanrefer_3b.yaml \
    --data.root "$root" --out "$out" --resume auto
# With geometry, 2D only, and with the geometry of another scene.
for geometry in fused zero shuffle; do
    run deepspeed launchers/evaluate.py --checkpoint "$out" --task scanrefer --geometry "$geometry"
done
run python launchers/export.py --checkpoint "$out" --out "$out-adapter"
