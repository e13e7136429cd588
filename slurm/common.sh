# Sourced by the batch scripts of this directory: where the program and its Python are, health of the nodes, launch, requeue.
#
#   IWSFT_VENV                the environment (default: .venv at the root)
#   IWSFT_CONTAINER           an image instead; IWSFT_CONTAINER_RUNTIME=pyxis (default) or apptainer; IWSFT_MOUNTS=SRC:DST,…
#   IWSFT_PROCESSES           processes a node (default: one a GPU; without GPUs one)
#   IWSFT_MIN_MEMORY_GIB, IWSFT_MIN_DISK_GIB   what a healthy node has free (default 16 and 10)
#   IWSFT_MAX_CRASHES         crashes without a new checkpoint between them, after which a run is given up (default 3)

say() { printf '%s [job %s, restart %s] %s\n' "$(date '+%F %T')" "$SLURM_JOB_ID" "${SLURM_RESTART_COUNT:-0}" "$*"; }

# Output of Python and of its workers appears when it is written, not when a buffer is full: the last lines of a crash count.
export PYTHONUNBUFFERED=1
# The work is on the GPUs, and the ranks of a node share its cores: a thread pool in each would only make them wait for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# One hardware queue, so that kernels run in the order they were launched in: tensor parallelism's overlap counts on it.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# A failed collective ends its process instead of leaving it waiting; failures, and nothing else, are printed.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1} NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Packed sequences differ in their shapes: segments that grow keep the allocator from fragmenting.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

gpus=${SLURM_GPUS_ON_NODE:-0}
[ "${IWSFT_DEVICE:-}" != cpu ] || gpus=0
processes=${IWSFT_PROCESSES:-$((gpus > 0 ? gpus : 1))}

# srun has not inherited --cpus-per-task since 22.05: without it every rank of a node would be bound to one core.
step=(srun "--cpus-per-task=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}")
if [ -z "${IWSFT_CONTAINER:-}" ]; then
  python=("${IWSFT_VENV:-$root/.venv}/bin/python")
  [ -x "${python[0]}" ] || { say "there is no Python at ${python[0]}: make the environment, or set IWSFT_VENV or IWSFT_CONTAINER."; exit 2; }
elif [ "${IWSFT_CONTAINER_RUNTIME:-pyxis}" = pyxis ]; then
  step+=("--container-image=$IWSFT_CONTAINER" "--container-workdir=$PWD" "--container-mounts=$root:$root,$PWD:$PWD${IWSFT_MOUNTS:+,$IWSFT_MOUNTS}")
  python=(python3)
elif [ "$IWSFT_CONTAINER_RUNTIME" = apptainer ]; then
  python=(apptainer exec --nv --pwd "$PWD" --bind "$root:$root,$PWD:$PWD${IWSFT_MOUNTS:+,$IWSFT_MOUNTS}" "$IWSFT_CONTAINER" python3)
else
  say "IWSFT_CONTAINER_RUNTIME is $IWSFT_CONTAINER_RUNTIME; it can be pyxis or apptainer."
  exit 2
fi

# on_one_node ARGS…: Python with ARGS in one process.
on_one_node() { "${step[@]}" --nodes=1 --ntasks=1 "${python[@]}" "$@"; }

# on_every_node ARGS…: torchrun with ARGS on every node of the allocation, in place of this shell, so that its signals are srun's.
# The rendezvous is the first node's; its port follows from the job and its restart, so that jobs on one machine, or a restart and
# what it restarts, do not meet.
on_every_node() {
  local address
  read -r address < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  exec "${step[@]}" "--nodes=$SLURM_JOB_NUM_NODES" "--ntasks=$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    "${python[@]}" -m megatron_iwsft.distributed.torchrun "--nnodes=$SLURM_JOB_NUM_NODES" "--nproc-per-node=$processes" \
    --rdzv-backend=static "--master-addr=$address" \
    "--master-port=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 10000))" "$@"
}

# check_nodes DIR: end the job, naming the nodes, if one of them is not fit to run; DIR is where files will be written.
check_nodes() {
  mkdir -p -- "$1" || exit 2
  # Each node answers for itself; one that does not answer at all is named by srun.
  timeout 180 "${step[@]}" "--nodes=$SLURM_JOB_NUM_NODES" "--ntasks=$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 \
    "${python[@]}" "$root/slurm/check_node.py" --gpus "$gpus" --memory-gib "${IWSFT_MIN_MEMORY_GIB:-16}" \
    --disk-gib "${IWSFT_MIN_DISK_GIB:-10}" --time "$(date +%s)" -- "$1" && return
  say "a node is not fit to run (see above). Submit again with --exclude=NODE, and tell the administrators."
  exit 1
}

# supervise DIR COMMAND…: run COMMAND to its end. Passes stop signals on. Requeues the job if it was stopped (status 75), or has
# crashed; gives up after too many crashes with no new checkpoint under DIR. Other statuses are the job's own.
supervise() {
  local directory=$1 status=0 again stopping='' child
  shift
  say "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd' '): $processes processes a node"
  "$@" &
  child=$!
  # Not CONT: Slurm sends it just before the others, and bash, with both trapped, loses the second while it waits.
  trap 'stopping=1; kill -USR1 $child 2>/dev/null' USR1
  trap 'stopping=1; kill -TERM $child 2>/dev/null' TERM
  while :; do
    wait $child && status=0 || status=$?
    kill -0 $child 2>/dev/null || break # else a signal has ended the wait, not the child
  done
  wait $child && again=0 || again=$?
  [ $again = 127 ] || status=$again
  if [ $status = 0 ] || [ $status = 2 ]; then
    return $status
  elif [ $status = 75 ] || [ -n "$stopping" ]; then
    requeue "stopped with status $status"
  elif may_crash "$directory"; then
    requeue "ended with status $status"
  fi
  say "ended with status $status; ${IWSFT_MAX_CRASHES:-3} times in a row without a new checkpoint: giving up"
  return $status
}

# may_crash DIR: whether a run may be started again after a crash; counts crashes since its newest checkpoint.
may_crash() {
  local file=$1/logs/crashes newest last='' count=0
  newest=$(cat -- "$1/checkpoints/latest" 2>/dev/null || echo none)
  if [ -f "$file" ]; then read -r last count <"$file"; fi
  [ "$last" = "$newest" ] || count=0
  mkdir -p -- "$1/logs" && echo "$newest $((count + 1))" >"$file"
  [ $((count + 1)) -lt "${IWSFT_MAX_CRASHES:-3}" ]
}

requeue() {
  local state reason preempted
  read -r state reason preempted < <(squeue -h -j "$SLURM_JOB_ID" -O 'StateCompact:20,Reason:40,PreemptTime:30') || true
  # Slurm would take back a job that was cancelled, too; one that it has requeued itself is ending as well.
  if [ "$state" = CG ] && [ "$reason" != TimeLimit ] && [ "$preempted" = N/A ]; then
    say "$1; cancelled or requeued from outside"
    exit 75
  fi
  say "$1; requeueing"
  scontrol requeue "$SLURM_JOB_ID" && sleep 30 # Slurm ends this script once it has requeued the job
  exit 75
}

# from_config SECTION.KEY CONFIG [OVERRIDE…]: a value of a config, which is checked before anything else starts.
from_config() {
  on_one_node -c 'import sys
from megatron_iwsft.utils.cli import run_command
def main():
    from megatron_iwsft.config.loader import load_config
    section, key = sys.argv[1].split(".")
    print(getattr(getattr(load_config(sys.argv[2], sys.argv[3:]), section), key))
run_command(main)' "$@"
}
