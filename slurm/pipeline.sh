#!/usr/bin/env bash
# The complete workflow as a chain of Slurm jobs, each of which starts when the previous one has succeeded:
# shard → reference → train → export → evaluate.
#
#   slurm/pipeline.sh --config CONFIG.yaml [options] [section.key=value …]
#
#   --records FILE        records to shard into the config's data.corpus; repeatable. Without it the corpus must exist, as those of
#                         data.corpora must
#   --shard-option ARG    an argument for iwsft shard (--tokenizer, its value, …); repeatable
#   --benchmark FILE      evaluate the exported model on FILE
#   --score CORPUS        or measure its log-likelihood on a corpus
#   --nodes N             nodes for the reference and training jobs (default 1)
#   --sbatch-option ARG   a further option of sbatch for these two (--gpus-per-node=8, --time=24:00:00, …); repeatable
#   --after JOB           start after this job
#
# For all jobs, sbatch reads SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT, … The model is exported to hf/final in the run's directory.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
usage() {
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
  exit 2
}

config='' benchmark='' score='' nodes=1 previous='' records=() shard=() training=() overrides=()
while [ $# -gt 0 ]; do
  case $1 in
    --config | --records | --shard-option | --benchmark | --score | --nodes | --sbatch-option | --after) [ $# -ge 2 ] || usage ;;
  esac
  case $1 in
    --config) config=$2 && shift 2 ;;
    --records) records+=("$2") && shift 2 ;;
    --shard-option) shard+=("$2") && shift 2 ;;
    --benchmark) benchmark=$2 && shift 2 ;;
    --score) score=$2 && shift 2 ;;
    --nodes) nodes=$2 && shift 2 ;;
    --sbatch-option) training+=("$2") && shift 2 ;;
    --after) previous=$2 && shift 2 ;;
    -*) usage ;;
    *=*) overrides+=("$1") && shift ;;
    *) usage ;;
  esac
done
[ -n "$config" ] || usage

# Checks the config before anything is submitted. Values end in a null byte, the only one that cannot be part of a path.
values=$(mktemp)
trap 'rm -f "$values"' EXIT
PYTHONPATH=$root "${IWSFT_PYTHON:-${IWSFT_VENV:-$root/.venv}/bin/python}" -m megatron_iwsft config --null \
  --get run.dir --get data.corpus --get reference.needs_sidecar "$config" "${overrides[@]}" >"$values"
{
  IFS= read -r -d '' run_dir
  IFS= read -r -d '' corpus
  IFS= read -r -d '' needs_sidecar
} <"$values"

# submit NAME SBATCH-ARGS…: submit a job that starts after the previous one, and is removed from the queue if that one fails.
submit() {
  local name=$1 dependency=()
  shift
  [ -z "$previous" ] || dependency=("--dependency=afterok:$previous")
  previous=$(sbatch --parsable --kill-on-invalid-dep=yes "${dependency[@]}" "$@")
  previous=${previous%%;*} # with several clusters, sbatch prints ID;CLUSTER
  echo "$name: job $previous"
}

if [ ${#records[@]} -gt 0 ] && [ "$corpus" = null ]; then
  echo "--records makes data.corpus, but $config has data.corpora: shard these first, then leave out --records." >&2
  exit 2
fi
if [ ${#records[@]} -gt 0 ]; then
  submit shard --job-name=iwsft-shard "$root/slurm/tool.sbatch" shard "${records[@]}" --output "$corpus" "${shard[@]}"
fi
if [ "$needs_sidecar" = true ]; then
  submit reference "--nodes=$nodes" ${training[@]+"${training[@]}"} "$root/slurm/precompute_reference.sbatch" "$config" "${overrides[@]}"
fi
submit train "--nodes=$nodes" ${training[@]+"${training[@]}"} "$root/slurm/train.sbatch" "$config" "${overrides[@]}"
submit export "$root/slurm/convert.sbatch" export --checkpoint "$run_dir" --output "$run_dir/hf/final"
if [ -n "$benchmark" ]; then
  submit evaluate "$root/slurm/evaluate.sbatch" --model "$run_dir/hf/final" --benchmark "$benchmark"
elif [ -n "$score" ]; then
  submit evaluate "$root/slurm/evaluate.sbatch" --model "$run_dir/hf/final" --corpus "$score"
fi
