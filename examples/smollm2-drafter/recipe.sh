#!/usr/bin/env bash
# How the drafter in this folder was made: every step can be killed and started again.
#
#   examples/smollm2-drafter/recipe.sh TARGET.gguf PROMPTS.jsonl HELD_OUT.jsonl WORK_FOLDER
#
# TARGET.gguf is SmolLM2-135M-Instruct (`make demo` fetches it to .cache/), PROMPTS.jsonl holds the prompts to answer,
# HELD_OUT.jsonl prompts to calibrate on that are in no other file. Needs dspark-edge[train]; on two cores some hours.
set -euo pipefail
target=$1 prompts=$2 held_out=$3 work=$4
mkdir -p "$work"

# The words come with a bundle: its tokenizer and chat template.
[ -e "$work/plain" ] || dspark-edge export --target "$target" --drafter ngram -o "$work/plain"

# The target's own answers. Most prompts are of one kind, so the other kinds are answered more than once, and the
# target makes up some prompts itself.
dspark-edge respond --bundle "$work/plain" --target "$target" --prompts "$prompts" --synthesise 1000 \
    --samples 1 --samples code=3 --samples chat=3 --greedy-share 0.7 --max-new-tokens 160 --wave 192 --seed 1 \
    -o "$work/responses.jsonl"

[ -e "$work/drafter/model.safetensors" ] || dspark-edge train --target "$target" \
    --responses "$work/responses.jsonl" -o "$work/drafter" \
    TRAIN_OPTIONS

[ -e "$work/bundle" ] || dspark-edge export --target "$target" --drafter "$work/drafter" -o "$work/bundle"
dspark-edge calibrate "$work/bundle" --prompts "$held_out"
