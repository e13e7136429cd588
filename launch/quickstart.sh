#!/usr/bin/env bash
# The complete workflow on a machine without a GPU, in a few minutes: generate a corpus of worked sums with quality scores, train a
# base model, compute its log-probs as reference, run SFT and iw-SFT on the curated part (tensor parallel, two processes), export to
# Hugging Face, generate an answer, write a report. Safe to repeat: finished parts are kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
make_environment "[report]"

out=runs/quickstart
iwsft() { "$python" -m megatron_iwsft "$@"; }
say() { printf '\n== %s\n' "$*"; }
train() { bash launch/local.sh 2 configs/quickstart.yaml "$@"; }
tuning=(model.config=null model.checkpoint=$out/base data.corpus=$out/corpus-curated optimizer.lr=3e-4
  data.micro_batch_size=4 data.global_batch_size=4 logging.every=50)

say "1/6 corpus: 12,000 worked sums, 30 % of them wrong, scored by a judge that is wrong in 10 % of cases"
[ -f $out/records.jsonl ] || iwsft make-arithmetic --output $out/records.jsonl --count 12000 --seed 1
[ -f $out/tokenizer/tokenizer.json ] ||
  iwsft train-tokenizer $out/records.jsonl --output $out/tokenizer --field prompt --field response --vocab-size 400
iwsft shard $out/records.jsonl --output $out/corpus-all --tokenizer $out/tokenizer --score-field score
iwsft shard $out/records.jsonl --output $out/corpus-curated --tokenizer $out/tokenizer --score-field score --min-score 0.5

say "2/6 base model: SFT from random weights on all records, two processes, tensor parallel 2"
train

say "3/6 reference: log-probs of the curated trajectories under the base model"
"$python" -m megatron_iwsft.distributed.torchrun --nproc_per_node 2 -m megatron_iwsft reference --config configs/quickstart.yaml \
  "${tuning[@]}" objective.name=iw_sft

say "4/6 SFT and iw-SFT on the curated trajectories"
train "${tuning[@]}" run.name=sft run.dir=$out/sft
train "${tuning[@]}" run.name=iw-sft run.dir=$out/iw-sft objective.name=iw_sft

say "5/6 export to Hugging Face, and run the exported model in transformers"
[ -d $out/hf ] || iwsft export --checkpoint $out/iw-sft --output $out/hf
iwsft verify $out/hf $out/iw-sft
iwsft generate --model $out/hf "What is 37 + 48?"

say "6/6 report"
iwsft report $out/sft $out/iw-sft --output $out/report.html

say "done. Model: $out/hf   report: $out/report.html   metrics: $out/*/metrics.jsonl   start over: rm -r $out"
