# Sourced by the batch scripts: find the program and its Python, check the nodes, launch, requeue.
#
#   IWSFT_PYTHON              the interpreter of an environment to use as it is
#   IWSFT_VENV                else a virtual environment (default: .venv in the repository root)
#   IWSFT_CONTAINER           container image to use instead; IWSFT_CONTAINER_RUNTIME=pyxis (default) or apptainer; IWSFT_MOUNTS=SRC:DST,…
#   IWSFT_PROCESSES           processes per node (default: one per GPU; one without GPUs)
#   IWSFT_MIN_MEMORY_GIB, IWSFT_MIN_DISK_GIB   free memory and disk space a node must have (default 16 and 10)
#   IWSFT_MAX_CRASHES         consecutive crashes without a new checkpoint after which the job is not requeued (default 3)

say() { printf '%s [job %s, restart %s] %s\n' "$(date '+%F %T')" "$SLURM_JOB_ID" "${SLURM_RESTART_COUNT:-0}" "$*"; }

# A stop signal at any moment: requeue the job, unless it ends by itself. `supervise` forwards signals meanwhile.
stopping=''
trap 'stopping=1' USR1 TERM
trap 'on_exit $?' EXIT
on_exit() {
  if [ -n "$stopping" ] && [ "$1" != 0 ] && [ "$1" != 2 ] && [ "$1" != 75 ]; then requeue "stopped with status $1"; fi
}

# Unbuffered output, so that the last lines before a crash are in the log.
export PYTHONUNBUFFERED=1
# The ranks of a node share its cores: a thread pool in each would oversubscribe them.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# A failed collective ends its process instead of hanging; NCCL logs only problems.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1} NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Packed sequences have varying shapes: expandable segments avoid fragmentation of the allocator.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

gpus=${SLURM_GPUS_ON_NODE:-0}
[ "${IWSFT_DEVICE:-}" != cpu ] || gpus=0
processes=${IWSFT_PROCESSES:-$((gpus > 0 ? gpus : 1))}

# Since Slurm 22.05 srun does not inherit --cpus-per-task: without it all ranks of a node would be bound to one core.
step=(srun "--cpus-per-task=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}")
if [ -z "${IWSFT_CONTAINER:-}" ]; then
  python=("${IWSFT_PYTHON:-${IWSFT_VENV:-$root/.venv}/bin/python}")
  command -v -- "${python[0]}" >/dev/null || {
    say "no Python at ${python[0]}: create the environment, or set IWSFT_PYTHON, IWSFT_VENV or IWSFT_CONTAINER."
    exit 2
  }
elif [ "${IWSFT_CONTAINER_RUNTIME:-pyxis}" = pyxis ]; then
  step+=("--container-image=$IWSFT_CONTAINER" "--container-workdir=$PWD" "--container-mounts=$root:$root,$PWD:$PWD${IWSFT_MOUNTS:+,$IWSFT_MOUNTS}")
  python=(python3)
elif [ "$IWSFT_CONTAINER_RUNTIME" = apptainer ]; then
  python=(apptainer exec --nv --pwd "$PWD" --bind "$root:$root,$PWD:$PWD${IWSFT_MOUNTS:+,$IWSFT_MOUNTS}" "$IWSFT_CONTAINER" python3)
else
  say "IWSFT_CONTAINER_RUNTIME must be pyxis or apptainer; found $IWSFT_CONTAINER_RUNTIME."
  exit 2
fi

# on_one_node ARGS…: run Python with ARGS in one process.
on_one_node() { "${step[@]}" --nodes=1 --ntasks=1 "${python[@]}" "$@"; }

# on_every_node ARGS…: run torchrun with ARGS on every node of the allocation. Replaces this shell, so that srun gets its signals.
# The rendezvous is on the first node. Its port depends on job and restart number, so that jobs on one machine, or a restart and the
# run before it, do not collide.
on_every_node() {
  local address
  read -r address < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  exec "${step[@]}" "--nodes=$SLURM_JOB_NUM_NODES" "--ntasks=$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    "${python[@]}" -m megatron_iwsft.distributed.torchrun "--nnodes=$SLURM_JOB_NUM_NODES" "--nproc-per-node=$processes" \
    --rdzv-backend=static "--master-addr=$address" \
    "--master-port=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 10000))" "$@"
}

# check_nodes DIR: end the job, naming the nodes, if any of them is unfit to run; DIR is where files will be written.
check_nodes() {
  mkdir -p -- "$1" || exit 2
  # Each node checks itself; srun names a node that does not answer.
  timeout 180 "${step[@]}" "--nodes=$SLURM_JOB_NUM_NODES" "--ntasks=$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 \
    "${python[@]}" "$root/slurm/check_node.py" --gpus "$gpus" --memory-gib "${IWSFT_MIN_MEMORY_GIB:-16}" \
    --disk-gib "${IWSFT_MIN_DISK_GIB:-10}" --time "$(date +%s)" -- "$1" && return
  say "a node is unfit to run (see above). Submit again with --exclude=NODE, and inform the administrators."
  exit 1
}

# supervise DIR COMMAND…: run COMMAND, forwarding stop signals. Requeues the job if COMMAND was stopped (status 75) or crashed; gives
# up after too many crashes with no new checkpoint under DIR. Statuses 0 and 2 (a user's mistake) end the job.
supervise() {
  local directory=$1 status=0 again child
  shift
  [ -z "$stopping" ] || requeue "stopped before it began"
  say "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd' '): $processes processes per node"
  "$@" &
  child=$!
  # Do not trap CONT: Slurm sends it just before the others, and bash would lose the second signal while it waits.
  trap 'stopping=1; kill -USR1 $child 2>/dev/null' USR1
  trap 'stopping=1; kill -TERM $child 2>/dev/null' TERM
  while :; do
    wait $child && status=0 || status=$?
    kill -0 $child 2>/dev/null || break # the wait was interrupted by a signal if the child is alive
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
  say "ended with status $status, ${IWSFT_MAX_CRASHES:-3} times in a row without a new checkpoint: giving up"
  return $status
}

# may_crash DIR: whether to restart a run after a crash; counts the crashes since its newest checkpoint.
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
  # Slurm would also requeue a cancelled job; a job that Slurm itself has requeued is completing, too.
  if [ "$state" = CG ] && [ "$reason" != TimeLimit ] && [ "$preempted" = N/A ]; then
    say "$1; cancelled or requeued from outside"
    exit 75
  fi
  say "$1; requeueing"
  scontrol requeue "$SLURM_JOB_ID" && sleep 30 # Slurm ends this script when it has requeued the job
  exit 75
}

# from_config SECTION.KEY CONFIG [OVERRIDE…]: print a value of a config. A mistake in the config ends the job before anything starts.
from_config() { on_one_node -m megatron_iwsft config --get "$@"; }
