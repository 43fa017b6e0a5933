#!/usr/bin/env bash
# How the drafter in this folder was made; every step can be killed and started again. Needs dspark-edge[train].
#
#   examples/smollm2-drafter/recipe.sh TARGET.gguf WORK_FOLDER [PROMPTS.jsonl]
#
# TARGET.gguf is SmolLM2-135M-Instruct (`make demo` fetches it to .cache/). The target's answers come with this folder,
# so that all of it takes eight hours on two cores; with PROMPTS.jsonl they are made anew, which takes three more.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
target=$1 work=$2 prompts=${3:-}
mkdir -p "$work"

if [ -z "$prompts" ]; then
    for name in responses {more,library,boxed,conversation,function,subject,own}-responses \
        {aside,problem,lengthy,routine,unseen,written,sums,further,retold,moresums}-responses; do
        [ -e "$work/$name.jsonl" ] || xz -dkc "$here/$name.jsonl.xz" > "$work/$name.jsonl"
    done
else
    # The words come with a bundle: its tokenizer and chat template.
    [ -e "$work/plain" ] || dspark-edge export --target "$target" --drafter ngram -o "$work/plain"
    python "$here/prompts.py" "$prompts" "$work"/{boxed,stub,sums,moresums}-prompts.jsonl
    python "$here/library_stubs.py" "$work/library-prompts.jsonl"
    python "$here/conversations.py" "$work/conversation-prompts.jsonl" "$work/function-prompts.jsonl"
    python "$here/more_conversations.py" "$work/subject-prompts.jsonl" "$work/aside-prompts.jsonl"
    python "$here/longer_conversations.py" "$work"/{lengthy,lengthy-aside,further}-prompts.jsonl
    python "$here/more_functions.py" "$work"/{routine,routine-aside,retold}-prompts.jsonl
    tail -n 96 "$work/boxed-prompts.jsonl" > "$work/problem-prompts.jsonl"
    respond() {
        dspark-edge respond --bundle "$work/plain" --target "$target" --wave 128 "$@"
    }
    # Most prompts are of one kind, so the other kinds are answered more than once, and the target makes up some itself.
    mixed=(--samples 1 --samples chat=2 --samples code=4 --max-length 420 --max-new-tokens 160)
    respond --prompts "$prompts" "${mixed[@]}" --synthesise 128 --greedy-share 0.75 --seed 1 -o "$work/responses.jsonl"
    respond --prompts "$prompts" "${mixed[@]}" --greedy-share 0.5 --seed 2 -o "$work/other-responses.jsonl"
    respond --prompts "$work/stub-prompts.jsonl" --samples 2 --greedy-share 1 --max-new-tokens 160 \
        -o "$work/stub-responses.jsonl"
    cat "$work"/{other,stub}-responses.jsonl > "$work/more-responses.jsonl"
    respond --prompts "$work/library-prompts.jsonl" --greedy-share 1 --max-new-tokens 128 --max-length 330 \
        -o "$work/library-responses.jsonl"
    head -n -96 "$work/boxed-prompts.jsonl" > "$work/other-boxed-prompts.jsonl"
    respond --prompts "$work/other-boxed-prompts.jsonl" --greedy-share 0.9 --max-new-tokens 144 --max-length 330 \
        -o "$work/boxed-responses.jsonl"
    respond --prompts "$work/conversation-prompts.jsonl" --greedy-share 0.85 --max-new-tokens 128 --max-length 520 \
        --seed 3 -o "$work/conversation-responses.jsonl"
    respond --prompts "$work/function-prompts.jsonl" --greedy-share 1 --max-new-tokens 128 \
        -o "$work/function-responses.jsonl"
    for kind in subject aside; do
        respond --prompts "$work/$kind-prompts.jsonl" --greedy-share 0.85 --max-new-tokens 128 --max-length 560 \
            --seed 21 -o "$work/$kind-responses.jsonl"
    done
    respond --synthesise 288 --greedy-share 1 --max-new-tokens 128 --max-length 330 --seed 21 \
        -o "$work/own-responses.jsonl"
    respond --prompts "$work/problem-prompts.jsonl" --greedy-share 1 --max-new-tokens 128 --max-length 330 \
        -o "$work/problem-responses.jsonl"
    for kind in lengthy lengthy-aside; do
        respond --prompts "$work/$kind-prompts.jsonl" --greedy-share 0.9 --max-new-tokens 128 --max-length 600 \
            --seed 51 -o "$work/$kind-conversations.jsonl"
    done
    for kind in routine routine-aside; do
        respond --prompts "$work/$kind-prompts.jsonl" --greedy-share 1 --max-new-tokens 128 --max-length 400 \
            -o "$work/$kind-responses.jsonl"
    done
    respond --synthesise 320 --greedy-share 1 --max-new-tokens 128 --max-length 330 --seed 41 \
        -o "$work/more-own.jsonl"
    cat "$work"/{lengthy-conversations,more-own}.jsonl > "$work/lengthy-responses.jsonl"
    cat "$work/lengthy-aside-conversations.jsonl" "$work/routine-aside-responses.jsonl" > "$work/unseen-responses.jsonl"
    respond --prompts "$here/written-prompts.jsonl" --greedy-share 1 --max-new-tokens 128 --max-length 640 \
        -o "$work/written-responses.jsonl"
    respond --prompts "$work/sums-prompts.jsonl" --greedy-share 1 --max-new-tokens 160 --max-length 420 --seed 71 \
        -o "$work/sums-responses.jsonl"
    respond --prompts "$work/moresums-prompts.jsonl" --greedy-share 1 --max-new-tokens 160 --max-length 420 --seed 81 \
        -o "$work/moresums-responses.jsonl"
    respond --prompts "$work/retold-prompts.jsonl" --greedy-share 1 --max-new-tokens 128 --max-length 400 \
        -o "$work/retold-responses.jsonl"
    respond --prompts "$work/further-prompts.jsonl" --greedy-share 0.9 --max-new-tokens 128 --max-length 600 \
        --seed 81 -o "$work/further-conversations.jsonl"
    respond --synthesise 320 --greedy-share 1 --max-new-tokens 128 --max-length 330 --seed 81 \
        -o "$work/further-own.jsonl"
    cat "$work"/{further-conversations,further-own}.jsonl > "$work/further-responses.jsonl"
fi

# First a little of everything, half of it on short blocks.
[ -e "$work/first/model.safetensors" ] || dspark-edge train --target "$target" --responses "$work/responses.jsonl" \
    -o "$work/first" --layers 2 --block-size 7 --draft-vocab 8192 --steps 600 --batch 8 --anchors 32 --warmup 30 \
    --evaluate-every 100 --checkpoint-every 50

# Then what that left weak, with a draft vocabulary chosen from all answers.
python "$here/pick.py" second "$work/second.jsonl" "$work"/{responses,{more,library,boxed}-responses}.jsonl
[ -e "$work/second/model.safetensors" ] || dspark-edge train --target "$target" --responses "$work/second.jsonl" \
    -o "$work/second" --warm-start "$work/first" --layers 2 --block-size 7 \
    --draft-vocab 10240 --count "$work/responses.jsonl" --count "$work/more-responses.jsonl" \
    --count "$work/library-responses.jsonl" --steps 1150 --batch 8 --anchors 32 --warmup 30 --learning-rate 0.0012 \
    --short-share 0.7 --divergence-share 0.6 --evaluate-every 100 --checkpoint-every 50

# And conversations of two turns, with confidences in what greedy decoding accepts.
python "$here/pick.py" third "$work/third.jsonl" \
    "$work"/{responses,{more,library,boxed,conversation,function}-responses}.jsonl
learn() {
    dspark-edge train --target "$target" --layers 2 --block-size 7 --draft-vocab 10240 \
        --count "$work/responses.jsonl" --count "$work/more-responses.jsonl" --count "$work/library-responses.jsonl" \
        --count "$work/conversation-responses.jsonl" --count "$work/function-responses.jsonl" \
        --batch 8 --anchors 32 --warmup 30 --learning-rate 0.001 --short-share 0.6 --divergence-share 0.6 \
        --cross-entropy 0.3 --confidence-target outcome --evaluate-every 100 --checkpoint-every 50 "$@"
}
[ -e "$work/third/model.safetensors" ] || learn --responses "$work/third.jsonl" -o "$work/third" \
    --warm-start "$work/second" --steps 1250

# More conversations, on other subjects.
python "$here/pick.py" fourth "$work/fourth.jsonl" \
    "$work"/{responses,{more,library,boxed,conversation,function,subject,own}-responses}.jsonl
[ -e "$work/fourth/model.safetensors" ] || learn --responses "$work/fourth.jsonl" -o "$work/fourth" \
    --warm-start "$work/third" --count "$work/subject-responses.jsonl" --count "$work/own-responses.jsonl" \
    --held-out 0.02 --steps 1000

# Longer ones, and more functions; what the confidence head shall learn from is left to it.
seen=()
for part in second third fourth; do seen+=(--unseen "$work/$part.jsonl"); done
python "$here/pick.py" confidence "$work/confidence.jsonl" \
    "$work"/{aside,problem,library,more,unseen,written}-responses.jsonl "${seen[@]}"
python "$here/pick.py" fifth "$work/fifth.jsonl" \
    "$work"/{responses,{more,library,boxed,function,subject,lengthy,routine}-responses}.jsonl \
    --unseen "$work/confidence.jsonl"
learn_more() {
    learn --count "$work/subject-responses.jsonl" --count "$work/own-responses.jsonl" \
        --count "$work/lengthy-responses.jsonl" --count "$work/routine-responses.jsonl" --held-out 0.02 "$@"
}
[ -e "$work/fifth/model.safetensors" ] || learn_more --responses "$work/fifth.jsonl" -o "$work/fifth" \
    --warm-start "$work/fourth" --steps 1000

# The confidence head alone, on answers that nothing above was trained on: first as the reference's, then with a look at
# the draft's own distribution, on all but the written prompts.
python "$here/pick.py" confidence "$work/unwritten.jsonl" "$work"/{aside,problem,library,more,unseen}-responses.jsonl \
    "${seen[@]}"
judge() {
    dspark-edge train --target "$target" --only confidence --confidence-target outcome --optimizer adamw --warmup 20 \
        --short-share 0 --batch 8 --anchors 32 --held-out 0.1 --checkpoint-every 85 "$@"
}
[ -e "$work/blind/model.safetensors" ] || judge --responses "$work/confidence.jsonl" -o "$work/blind" \
    --warm-start "$work/fifth" --no-confidence-draft-probs --learning-rate 0.002 --steps 340 --evaluate-every 85
judge_again() {
    judge --responses "$work/unwritten.jsonl" --learning-rate 0.005 "$@"
}
[ -e "$work/judged/model.safetensors" ] || judge_again -o "$work/judged" --warm-start "$work/blind" \
    --steps 400 --evaluate-every 100

# What is left of the answers, most of it sums, beside some of the conversations; and the confidence head once more.
for part in fifth confidence; do seen+=(--unseen "$work/$part.jsonl"); done
python "$here/pick.py" sixth "$work/sixth.jsonl" "$work/more-responses.jsonl" "${seen[@]}"
python "$here/pick.py" again "$work/again.jsonl" \
    "$work"/{library,boxed,conversation,function,subject,lengthy,routine}-responses.jsonl \
    --unseen "$work/confidence.jsonl"
[ -e "$work/sixth/model.safetensors" ] || learn_more --responses "$work/sixth.jsonl" \
    --responses "$work/again.jsonl" -o "$work/sixth" --warm-start "$work/judged" --steps 1300
[ -e "$work/rejudged/model.safetensors" ] || judge_again -o "$work/rejudged" --warm-start "$work/sixth" \
    --steps 400 --evaluate-every 100

# Other sums, beside conversations and functions that the sixth did not take again; and the confidence head once more.
seen+=(--unseen "$work/sixth.jsonl")
python "$here/pick.py" seventh "$work/seventh.jsonl" "$work/sums-responses.jsonl" "${seen[@]}"
python "$here/pick.py" beside "$work/beside.jsonl" \
    "$work"/{library,conversation,function,subject,lengthy,routine,more}-responses.jsonl \
    --unseen "$work/confidence.jsonl" --unseen "$work/again.jsonl"
[ -e "$work/seventh/model.safetensors" ] || learn_more --responses "$work/seventh.jsonl" \
    --responses "$work/beside.jsonl" -o "$work/seventh" --warm-start "$work/rejudged" --steps 900
[ -e "$work/judged-seventh/model.safetensors" ] || judge_again -o "$work/judged-seventh" \
    --warm-start "$work/seventh" --steps 250 --evaluate-every 125

# Other answers of all kinds, among functions and problems that neither took again; and the confidence head once more.
seen+=(--unseen "$work/seventh.jsonl")
python "$here/pick.py" eighth "$work/eighth.jsonl" "$work"/{further,retold,moresums}-responses.jsonl "${seen[@]}"
python "$here/pick.py" among "$work/among.jsonl" \
    "$work"/{library,function,routine,more,boxed,lengthy,subject}-responses.jsonl \
    --unseen "$work/confidence.jsonl" --unseen "$work/again.jsonl" --unseen "$work/beside.jsonl"
[ -e "$work/eighth/model.safetensors" ] || learn_more --responses "$work/eighth.jsonl" \
    --responses "$work/among.jsonl" -o "$work/eighth" --warm-start "$work/judged-seventh" --steps 1150
[ -e "$work/drafter/model.safetensors" ] || judge_again -o "$work/drafter" --warm-start "$work/eighth" \
    --steps 250 --evaluate-every 125

[ -e "$work/bundle" ] || dspark-edge export --target "$target" --drafter "$work/drafter" -o "$work/bundle"
dspark-edge calibrate "$work/bundle" --prompts "$here/calibration-prompts.jsonl"
