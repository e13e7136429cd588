#!/usr/bin/env bash
# Everything that a GPU must show, in ten minutes, as one report: tools/bench/gpu_day.sh OUT [--dry-run]
#
#   OUT          directory for the report (report.md) and the output of every part
#   --dry-run    the same parts on the CPU with tiny sizes: shows that they start, not what a GPU does
#
# Uses the Python of IWSFT_PYTHON, else of an active environment, else python3, as it is: nothing is installed. Parts run in order of
# importance. Each has its own time limit and fails alone; what does not fit into IWSFT_GPU_DAY_SECONDS (default 590) is left out.
set -uo pipefail
[ $# -ge 1 ] && [ "${1#-}" = "$1" ] || { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2; exit 2; }
mkdir -p -- "$1" && out=$(cd -- "$1" && pwd) || exit 2
dry=''
[ "${2:-}" != --dry-run ] || dry=yes
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
export IWSFT_PYTHON=${IWSFT_PYTHON:-${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}}
export IWSFT_PYTHON=${IWSFT_PYTHON:-$(command -v python3)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
[ -z "$dry" ] || export IWSFT_DEVICE=cpu OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python=$IWSFT_PYTHON
deadline=$((SECONDS + ${IWSFT_GPU_DAY_SECONDS:-590}))
report=$out/report.md
summary=$out/summary.md
parts=$out/parts.md
: >"$parts"
: >"$summary"

# part NAME SECONDS COMMAND…: run a part for at most SECONDS; its output goes to OUT/NAME.log and OUT/NAME.err, and into the report.
part() {
  local name=$1 limit=$2 started=$SECONDS status=0 left=$((deadline - SECONDS)) result
  shift 2
  echo "== $name"
  [ "$left" -ge "$limit" ] || limit=$left
  if [ "$limit" -le 5 ]; then
    result='left out: no time left'
    : >"$out/$name.log"
    : >"$out/$name.err"
  else
    # timeout ends the part's whole process group: torchrun's workers and what pytest has started, too.
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>"$out/$name.err" </dev/null || status=$?
    case $status in
      0) result=ok ;;
      124 | 137) result="stopped after its limit of $limit s" ;;
      *) result="failed with status $status" ;;
    esac
  fi
  echo "   $result, $((SECONDS - started)) s"
  printf '| %s | %s | %d s |\n' "$name" "$result" $((SECONDS - started)) >>"$summary"
  {
    printf '\n## %s\n\n`%s`\n\n%s, %d s\n' "$name" "$*" "$result" $((SECONDS - started))
    [ ! -s "$out/$name.log" ] || { printf '\n```text\n'; tail -n 300 "$out/$name.log"; printf '```\n'; }
    [ ! -s "$out/$name.err" ] || { printf '\nStandard error, the last 200 lines:\n\n```text\n'; tail -n 200 "$out/$name.err"; printf '```\n'; }
  } >>"$parts"
  write_report # after every part: a machine that is taken away leaves what was found
}

write_report() {
  {
    printf '# GPU report\n\n%s, commit %s%s\n\n```text\n' "$(date -u '+%F %T UTC')" \
      "$(git rev-parse --short HEAD 2>/dev/null || echo unknown)" "${dry:+, a dry run on the CPU: no figure here is of a GPU}"
    cat "$out/machine.txt"
    printf '```\n\n| part | result | time |\n|---|---|---|\n'
    cat "$summary" "$parts"
  } >"$report.partial" && mv -- "$report.partial" "$report"
}

{
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv 2>/dev/null || echo 'no nvidia-smi'
  nproc | sed 's/$/ CPU cores/'
  "$python" - <<'PYTHON'
import importlib.metadata, platform
print("python", platform.python_version())
for name in ("torch", "triton", "megatron-core", "transformer-engine", "transformers", "numpy", "liger-kernel", "cut-cross-entropy"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "missing")
PYTHON
} >"$out/machine.txt" 2>&1

if [ -n "$dry" ]; then
  operator=(--device cpu --tokens 64 --vocabulary 512 --hidden 64 --seconds 0.2 --only ours full-logits)
  sizes=(--seq-length 128 --batch 2 --steps 2 --warmup 1 --vocabulary 512 --dtype fp32)
  small=tiny large=tiny recipes=()
else
  operator=(--device cuda --tokens 8192 --vocabulary 151936 --hidden 1536 3584 --dtype bf16 --seconds 4)
  sizes=(--seq-length 4096 --batch 8 --steps 5 --warmup 2)
  small=1.5b large=7b-quarter recipes=(delayed tensorwise blockwise)
  [ "$("$python" -c 'import torch; print(torch.cuda.get_device_capability()[0])' 2>/dev/null)" != 10 ] || recipes+=(mxfp8)
fi
# Weights and corpus are made once per shape; a process runs all objectives of a precision.
kept=$(mktemp -d)
trap 'rm -rf -- "$kept"' EXIT
train() {
  local name=$1 limit=$2 model=$3
  shift 3
  part "train-$name" "$limit" "$python" tools/bench/train.py --no-peer --share-process --model "$model" --keep "$kept/$model" "${sizes[@]}" "$@"
}

part doctor 100 "$python" tools/doctor.py --gpu --time-limit 45
part operator 60 "$python" tools/bench/logprob.py "${operator[@]}"
train 1.5b-bf16 120 "$small"
train 7b-bf16 120 "$large"
for recipe in ${recipes[@]+"${recipes[@]}"}; do
  train "1.5b-$recipe" 90 "$small" --only-fp8 --fp8 "$recipe"
done
part tests 180 bash tests/run.sh --gpu
for recipe in ${recipes[@]+"${recipes[@]}"}; do
  train "7b-$recipe" 90 "$large" --only-fp8 --fp8 "$recipe"
done
echo "report: $report"
grep -q -v '| ok |' "$summary" && exit 1 || exit 0
