#!/usr/bin/env bash
# Run what only a machine with a GPU can show, in under eight minutes, with one table last.
#
#     tests/benchmarks/gpu.sh [CHECKPOINT FILE.py:FACTORY IMAGES]
#
# The arguments are a float ResNet-20 and CIFAR-10 as folders of images, as for evidence.py; without
# them, the fifteen epochs are left out. Each part has its own limit in seconds, so that one that
# hangs costs no other. What a part prints is in $OUT. Settings, by the environment:
#
#     OUT=FOLDER      for all output (default: a new one)
#     ONLY=REGEX      parts to run (default: all)
#     DEVICE=cpu      the same parts on a CPU, with small steps and ten times the limits
#     PYTHON=COMMAND  (default: python)
set -uo pipefail

cd "$(dirname "$0")/../.."
root=$PWD
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
device=${DEVICE:-cuda}
if [[ $device == cpu ]]; then patience=10; else patience=1; fi
out=$(realpath "${OUT:-$(mktemp -d)}")
mkdir -p "$out"
: > "$out/parts.tsv"
python=${PYTHON:-python}

part() { # NAME LIMIT COMMAND...
    local name=$1 limit=$(($2 * patience)) began=$SECONDS code
    shift 2
    [[ $name =~ ${ONLY:-.} ]] || return 0
    echo "$name (at most $limit s)" >&2
    timeout --kill-after 5 "$limit" "$@" > "$out/$name.out" 2> "$out/$name.err"
    code=$?
    printf '%s\t%s\t%s\n' "$name" "$code" $((SECONDS - began)) >> "$out/parts.tsv"
}

steps() { # MODEL PRECISION SIZE BATCH
    local size=$3 batch=$4 rounds=10
    if [[ $device == cpu ]]; then size=32 batch=2 rounds=1; fi
    part "steps_$1_$2" 30 "$python" tests/benchmarks/step_time.py --json --device "$device" \
        --model "$1" --precision "$2" --size "$size" --batch "$batch" --rounds "$rounds"
}

part card 20 "$python" -c '
import sys, torch
cuda = torch.version.cuda and torch.cuda.is_available()
print(torch.cuda.get_device_name() if cuda else "no GPU", "torch", torch.__version__)'
part cuda_tests 70 "$python" -m pytest -q -n 0 -m cuda
steps resnet20 float32 32 128
steps mlp float32 32 1024
steps resnet18 float32 224 256
steps resnet18 bfloat16 224 256
steps mobilenet_v2 float32 224 256
steps mobilenet_v2 bfloat16 224 256
part quickstart 30 "$python" -m ddqcli finetune recipes/quickstart/model.pt \
    --recipe recipes/quickstart/ddq.yaml --target-bits 4 --max-bits 8 --device "$device" \
    --run-dir "$out/quickstart_run" --json
if [[ $# -eq 3 ]]; then
    part resnet20_2_2 110 "$python" -m ddqcli finetune "$1" --recipe recipes/cifar10_resnet20.yaml \
        --arch "$2" --data "$3" --target-bits 2 --act-bits 2 --device "$device" \
        --run-dir "$out/resnet20_run" --json
fi
part suite 130 "$python" -m pytest -q -n "$(nproc)"

"$python" tests/benchmarks/gpu_summary.py "$out"
