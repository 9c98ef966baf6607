#!/usr/bin/env bash
# The steps of docs/research/study.md, in the repository root:  bash docs/research/study/run.sh STEP...
#
#   data       rooms and prepared sets
#   starts     accuracy of every start before training
#   arms       train and evaluate all arms
#   causality  geometric causality of every arm, seeds 0 and 1
#   tables     decision and tables, printed
#
# The same command continues an interrupted step. OUT/starts/START has the weights of a start: vlm/ and
# geometry_merger.safetensors. Other curves and encoders: the document.
set -euo pipefail

OUT=${OUT:-runs/study}             # folder of the study
STARTS=${STARTS:-a b}              # names of the starts
SEEDS=${SEEDS:-5}                  # seeds of every start
ARMS=${ARMS:-docs/research/study/arms.yaml}
EVALUATIONS=${EVALUATIONS:-docs/research/study/evaluations.yaml}
TRAIN_SCENES=${TRAIN_SCENES:-600}
VAL_SCENES=${VAL_SCENES:-100}
CAUSALITY_LIMIT=${CAUSALITY_LIMIT:-60}
CAUSALITY_SEEDS=${CAUSALITY_SEEDS:-0 1}
read -ra MORE <<< "${MORE:-}"      # more options of w2r2 ablate, for all arms

rooms=$OUT/rooms
splits=(val val_furniture_scale val_focal_length val_room_scale val_camera)

data() {
    python launchers/prepare.py synthetic --out "$rooms" --seed 11 \
        --train_scenes "$TRAIN_SCENES" --val_scenes "$VAL_SCENES" --image_size '[168,112]' --frames_per_scene 6 \
        --sentences phrases --world_frame corner --shift '[furniture_scale,focal_length,room_scale,camera]' \
        --camera_drop 0 --camera_flatter 10
    local all
    all=$(IFS=,; echo "train,${splits[*]}")
    python launchers/prepare.py scanrefer --root "$rooms" --visibility depth --format video3dllm --decimals 1 \
        --frames.protocol uniform --frames.count 4 --splits "[$all]"
}

# weights START: options of the model of a start
weights() {
    local folder=$OUT/starts/$1
    echo "--data.root=$rooms --model.vlm=$folder/vlm --model.merger=$folder/geometry_merger.safetensors"
}

ablate() { # ablate START OUT OPTION...
    local options
    read -ra options <<< "$(weights "$1")"
    python launchers/ablate.py --config docs/research/study/recipe.yaml --out "$2" "${options[@]}" "${@:3}" \
        --evaluations "$EVALUATIONS" "${MORE[@]}"
}

starts() { # one step with a learning rate of almost 0 is the start itself
    for start in $STARTS; do
        ablate "$start" "$OUT/before/$start" --grid '{train.steps: 1}' --seeds 1 --train.lr 1e-12 --train.merger_lr 1e-12
    done
}

arms() {
    for start in $STARTS; do
        ablate "$start" "$OUT/arms/$start" --grid "$ARMS" --seeds "$SEEDS" --metrics "acc@0.25"
    done
}

causality() {
    local run seed
    for seed in $CAUSALITY_SEEDS; do
        for run in "$OUT"/arms/*/runs/*/"seed-$seed"; do
            [ -f "$run/diagnosis/diagnosis-scanrefer.json" ] && continue
            python launchers/diagnose.py --checkpoint "$run" --data "$rooms/prepared/scanrefer/val" \
                --out "$run/diagnosis" --limit "$CAUSALITY_LIMIT" --causality_limit "$CAUSALITY_LIMIT" \
                --max_new_tokens 48 --batch_size 32 --resamples 100 > "$run/diagnosis.txt"
        done
    done
}

tables() { python docs/scripts/study.py "$OUT/arms" --root "$rooms"; }

for step in "$@"; do
    case $step in
        data | starts | arms | causality | tables) "$step" ;;
        *) echo "unknown step $step; the steps are data, starts, arms, causality and tables" >&2; exit 2 ;;
    esac
done
