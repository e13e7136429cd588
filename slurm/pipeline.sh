#!/usr/bin/env bash
# The whole way as a chain of Slurm jobs, each starting when the one before has succeeded:
# shard → reference → train → export → evaluate.
#
#   slurm/pipeline.sh --config CONFIG.yaml [options] [section.key=value …]
#
#   --records FILE        records to shard into the config's data.corpus; repeat for several. Without it the corpus is there already
#   --shard-option ARG    an argument for tools/shard_corpus.py (--tokenizer, its value, …); repeat
#   --benchmark FILE      evaluate the export on it       --score CORPUS    or measure its log-likelihood of a corpus
#   --nodes N             of the reference and training jobs (default 1)
#   --after JOB           begin after that job
#
# Partition, account and time come from SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT, … as sbatch reads them.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
usage() {
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
  exit 2
}

config='' benchmark='' score='' nodes=1 previous='' records=() shard=() overrides=()
while [ $# -gt 0 ]; do
  case $1 in
    --config | --records | --shard-option | --benchmark | --score | --nodes | --after) [ $# -ge 2 ] || usage ;;
  esac
  case $1 in
    --config) config=$2 && shift 2 ;;
    --records) records+=("$2") && shift 2 ;;
    --shard-option) shard+=("$2") && shift 2 ;;
    --benchmark) benchmark=$2 && shift 2 ;;
    --score) score=$2 && shift 2 ;;
    --nodes) nodes=$2 && shift 2 ;;
    --after) previous=$2 && shift 2 ;;
    -*) usage ;;
    *=*) overrides+=("$1") && shift ;;
    *) usage ;;
  esac
done
[ -n "$config" ] || usage

# From the config, checked before anything is submitted. Names are ended by a null byte, since any other may be part of one.
values=$(mktemp)
trap 'rm -f "$values"' EXIT
PYTHONPATH=$root "${IWSFT_VENV:-$root/.venv}/bin/python" -c 'import sys
from megatron_iwsft.utils.cli import run_command
def main():
    from megatron_iwsft.config.loader import load_config
    from megatron_iwsft.objectives.custom import find_objective
    c = load_config(sys.argv[1], sys.argv[2:])
    cached = find_objective(c.objective.name).needs_reference and c.reference.source == "cached"
    print(c.run.dir, c.data.corpus, "cached" if cached else "", sep="\0", end="\0")
run_command(main)' "$config" "${overrides[@]}" >"$values"
{
  IFS= read -r -d '' run_dir
  IFS= read -r -d '' corpus
  IFS= read -r -d '' reference
} <"$values"

# submit NAME SBATCH-ARGS…: after the job before it; a job whose predecessor has failed is removed rather than left waiting.
submit() {
  local name=$1 dependency=()
  shift
  [ -z "$previous" ] || dependency=("--dependency=afterok:$previous")
  previous=$(sbatch --parsable --kill-on-invalid-dep=yes "${dependency[@]}" "$@")
  previous=${previous%%;*} # of several clusters, the id comes with the cluster's name
  echo "$name: job $previous"
}

if [ ${#records[@]} -gt 0 ]; then
  submit shard --job-name=iwsft-shard "$root/slurm/tool.sbatch" shard_corpus "${records[@]}" --output "$corpus" "${shard[@]}"
fi
if [ -n "$reference" ]; then
  submit reference "--nodes=$nodes" "$root/slurm/precompute_reference.sbatch" "$config" "${overrides[@]}"
fi
submit train "--nodes=$nodes" "$root/slurm/train.sbatch" "$config" "${overrides[@]}"
submit export "$root/slurm/convert.sbatch" export --checkpoint "$run_dir" --output "$run_dir/hf"
if [ -n "$benchmark" ]; then
  submit evaluate "$root/slurm/evaluate.sbatch" --model "$run_dir/hf" --benchmark "$benchmark"
elif [ -n "$score" ]; then
  submit evaluate "$root/slurm/evaluate.sbatch" --model "$run_dir/hf" --corpus "$score"
fi
