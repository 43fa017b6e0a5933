#!/usr/bin/env bash
# How the drafter in this folder was made; every step can be killed and started again. Needs dspark-edge[train].
#
#   examples/smollm2-drafter/recipe.sh TARGET.gguf WORK_FOLDER [PROMPTS.jsonl]
#
# TARGET.gguf is SmolLM2-135M-Instruct (`make demo` fetches it to .cache/). The target's answers come with this folder,
# so that training takes half an hour on two cores; with PROMPTS.jsonl they are made anew, which takes another hour.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
target=$1 work=$2 prompts=${3:-}
mkdir -p "$work"

if [ -z "$prompts" ]; then
    xz -dkc "$here/responses.jsonl.xz" > "$work/responses.jsonl"
    responses=(--responses "$work/responses.jsonl")
else
    # The words come with a bundle: its tokenizer and chat template.
    [ -e "$work/plain" ] || dspark-edge export --target "$target" --drafter ngram -o "$work/plain"
    python "$here/prompts.py" "$prompts" "$work/boxed-prompts.jsonl" "$work/stub-prompts.jsonl"
    respond() {
        dspark-edge respond --bundle "$work/plain" --target "$target" --max-new-tokens 160 --wave 128 "$@"
    }
    # Most prompts are of one kind, so the other kinds are answered more than once, and the target makes up some itself.
    respond --prompts "$prompts" --samples 1 --samples chat=2 --samples code=4 --synthesise 128 --greedy-share 0.75 \
        --max-length 420 --seed 1 -o "$work/answers.jsonl"
    respond --prompts "$work/boxed-prompts.jsonl" --greedy-share 0.85 -o "$work/boxed.jsonl"
    respond --prompts "$work/stub-prompts.jsonl" --samples 2 --greedy-share 1 -o "$work/stubs.jsonl"
    responses=(--responses "$work/answers.jsonl" --responses "$work/boxed.jsonl" --responses "$work/stubs.jsonl")
fi

[ -e "$work/drafter/model.safetensors" ] || dspark-edge train --target "$target" "${responses[@]}" \
    -o "$work/drafter" --layers 2 --block-size 7 --draft-vocab 8192 --steps 600 --batch 8 --anchors 32 --warmup 30 \
    --evaluate-every 100 --checkpoint-every 50

[ -e "$work/bundle" ] || dspark-edge export --target "$target" --drafter "$work/drafter" -o "$work/bundle"
dspark-edge calibrate "$work/bundle" --prompts "$here/calibration-prompts.jsonl"
