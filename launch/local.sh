#!/usr/bin/env bash
# Train on this machine with N processes (one per GPU; on CPU, one per core): launch/local.sh N CONFIG.yaml [section.key=value …]
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: launch/local.sh N CONFIG.yaml [section.key=value …]" >&2
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/environment.sh"
make_environment
processes=$1 config=$2
shift 2
exec "$python" -m megatron_iwsft.distributed.torchrun --nproc_per_node "$processes" -m megatron_iwsft train --config "$config" "$@"
