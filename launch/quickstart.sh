#!/usr/bin/env bash
# Everything on a fresh machine without a GPU, in a few minutes: a generated corpus of worked sums with quality scores, a base
# model, its log-probs as reference, SFT and iw-SFT on the curated part with tensor parallelism over two processes, export to
# Hugging Face, an answer from the exported model, and a report. Safe to run again: finished parts are kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
make_environment

out=runs/quickstart
say() { printf '\n== %s\n' "$*"; }
train() { bash launch/local.sh 2 configs/quickstart.yaml "$@"; }
tuning=(model.config=null model.checkpoint=$out/base data.corpus=$out/corpus-curated optimizer.lr=3e-4
  data.micro_batch_size=4 data.global_batch_size=4 logging.every=50)

say "1/6 a corpus: 12,000 worked sums, 30 % of them wrong, scored by a judge that errs in 10 % of cases"
if [ ! -f $out/records.jsonl ]; then
  "$python" tools/make_arithmetic.py --output $out/records.jsonl.partial --count 12000 --seed 1
  mv $out/records.jsonl.partial $out/records.jsonl
fi
[ -f $out/tokenizer/tokenizer_config.json ] ||
  "$python" tools/train_tokenizer.py $out/records.jsonl --output $out/tokenizer --field prompt --field response --vocab-size 400
"$python" tools/shard_corpus.py $out/records.jsonl --output $out/corpus-all --tokenizer $out/tokenizer --score-field score
"$python" tools/shard_corpus.py $out/records.jsonl --output $out/corpus-curated --tokenizer $out/tokenizer --score-field score --min-score 0.5

say "2/6 a base model: SFT from random weights on everything, two processes, tensor parallel 2"
train

say "3/6 the reference: the base model's log-probs of the curated trajectories"
"$python" -m megatron_iwsft.distributed.torchrun --nproc_per_node 2 tools/precompute_reference.py --config configs/quickstart.yaml \
  "${tuning[@]}" objective.name=iw_sft

say "4/6 SFT and iw-SFT on the curated trajectories"
train "${tuning[@]}" run.name=sft run.dir=$out/sft
train "${tuning[@]}" run.name=iw-sft run.dir=$out/iw-sft objective.name=iw_sft

say "5/6 export to Hugging Face, and the exported model in transformers"
[ -d $out/hf ] || "$python" tools/convert_hf.py export --checkpoint $out/iw-sft --output $out/hf
"$python" tools/convert_hf.py verify $out/hf $out/iw-sft
"$python" tools/generate.py --model $out/hf "What is 37 + 48?"

say "6/6 a report"
"$python" tools/report.py $out/sft $out/iw-sft --output $out/report.html

say "done. Model: $out/hf   report: $out/report.html   metrics: $out/*/metrics.jsonl   to start over: rm -r $out"
