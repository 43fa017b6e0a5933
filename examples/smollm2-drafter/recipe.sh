#!/usr/bin/env bash
# How the drafter in this folder was made; every step can be killed and started again. Needs dspark-edge[train].
#
#   examples/smollm2-drafter/recipe.sh TARGET.gguf WORK_FOLDER PROMPTS.jsonl EVALUATED.jsonl [cuda|cpu]
#
# TARGET.gguf is SmolLM2-135M-Instruct (`make demo` fetches it to .cache/). On an H200 answers took 200 s, training
# 300 s and the confidence head 25 s. Without a GPU, ask for less: PART=20 takes a twentieth of the answers and steps.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
target=$(realpath "$1") work=$2 prompts=$(realpath "$3") evaluated=$(realpath "$4") device=${5:-cuda} part=${PART:-1}
mkdir -p "$work"
cd "$work"

if [ ! -e train.jsonl ]; then
    python "$here/library_stubs.py" library-prompts.jsonl
    python "$here/package_stubs.py" package-prompts.jsonl numpy scipy sympy networkx mpmath matplotlib fontTools torch \
        transformers onnx onnxscript click rich jinja2 hypothesis requests pygments pyparsing sortedcontainers urllib3 \
        yaml anyio huggingface_hub setuptools
    python "$here/conversations.py" conversation-prompts.jsonl function-prompts.jsonl
    python "$here/more_conversations.py" {subject,aside}-prompts.jsonl
    python "$here/longer_conversations.py" {lengthy,lengthy-aside,further}-prompts.jsonl
    python "$here/more_functions.py" {routine,routine-aside,retold}-prompts.jsonl
    python "$here/openings.py" openings.jsonl
    python "$here/gather.py" "$prompts" . "$evaluated"
    total=$(wc -l < train.jsonl)
    head -n $((total / 2 / part)) train.jsonl > given0-prompts.jsonl
    tail -n $((total / 2 / part)) train.jsonl > given1-prompts.jsonl
    cp openings.jsonl made0-openings.jsonl
    tail -n +15001 openings.jsonl > made1-openings.jsonl
fi

# The target's answers: to these prompts, and to what it makes up itself, a quarter of each in a process of its own, as
# one alone leaves most of a large GPU idle.
respond() {
    dspark-edge respond --target "$target" --device "$device" --max-length 640 --max-new-tokens 192 \
        --greedy-share 0.85 --wave "${WAVE:-3072}" "$@"
}
for half in 0 1; do
    respond --synthesise $((15000 / part)) --openings made$half-openings.jsonl --synthesised-turns 2 \
        --temperature 0.8 --seed 20$half -o made$half.jsonl &
    respond --prompts given$half-prompts.jsonl --samples 1 --samples math=2 --samples chat=3 --seed 21$half \
        -o given$half.jsonl &
done
respond --prompts unseen.jsonl --greedy-share 1 --seed 203 -o unseen-responses.jsonl
wait

[ -e main/model.safetensors ] || dspark-edge train --target "$target" \
    --responses made0.jsonl --responses made1.jsonl --responses given0.jsonl --responses given1.jsonl -o main \
    --layers 2 --block-size 7 --draft-vocab 10240 --mask-token-id 49151 --steps $((3000 / part)) --batch 64 \
    --anchors 64 --cross-entropy 0.3 --confidence-target outcome --short-share 0.3 --held-out 0.01 --max-length 640 \
    --cache-gb 0 --evaluate-every 500 --checkpoint-every 250

# The confidence head alone, on answers that nothing above was trained on.
[ -e drafter/model.safetensors ] || dspark-edge train --target "$target" --responses unseen-responses.jsonl \
    -o drafter --warm-start main --only confidence --confidence-target outcome --optimizer adamw --warmup 20 \
    --short-share 0 --batch 64 --anchors 64 --held-out 0.1 --cache-gb 0 --learning-rate 0.005 --steps 250 \
    --evaluate-every 125

[ -e bundle ] || dspark-edge export --target "$target" --drafter drafter -o bundle
dspark-edge calibrate bundle --prompts "$here/calibration-prompts.jsonl"
