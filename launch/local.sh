#!/usr/bin/env bash
# Train on this machine with N processes (one per GPU; on CPU, one per core): launch/local.sh N CONFIG.yaml [section.key=value …]
set -euo pipefail
trap 'exit 75' USR1 TERM INT # stopped on request, here before anything has begun
if [ $# -lt 2 ]; then
  echo "usage: launch/local.sh N CONFIG.yaml [section.key=value …]" >&2
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/environment.sh"
make_environment
processes=$1 config=$2
shift 2
# Signals wait until Python can handle them, where env has this option (coreutils 8.31).
hold=(env --block-signal=USR1,TERM,INT)
"${hold[@]}" true 2>/dev/null || hold=()
exec "${hold[@]}" "$python" -m megatron_iwsft.distributed.torchrun --nproc_per_node "$processes" \
  -m megatron_iwsft train --config "$config" "$@"
