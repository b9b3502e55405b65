# shellcheck shell=bash
# Sourced by a batch script in the checkout, whose arguments are those of train.py. Sets how many ranks there are and
# where they meet, and queues the job again at its end if that is right. srun and the ranks read everything from the
# environment, so the line that starts them is a bare "srun python -P -m cit_scale.train".

if [[ -z ${SLURM_JOB_ID:-} ]]; then
  echo "error: this is a batch script; queue it with sbatch" >&2
  exit 2
fi

# Use fewer nodes than Slurm allotted if the global batch is not a multiple of all of them (--min-nodes of submit.py).
# CIT_NODE_COUNTS lists the possible counts, largest first.
nodes=$SLURM_JOB_NUM_NODES
for count in ${CIT_NODE_COUNTS:-$nodes}; do
  if (( count <= nodes )); then
    nodes=$count
    break
  fi
done
# One rank per GPU. Without GPUs as many as --ntasks-per-node or --ntasks says, otherwise one per node.
gpus=${SLURM_GPUS_ON_NODE:-0}
ranks=${SLURM_NTASKS_PER_NODE:-$((gpus > 0 ? gpus : ${SLURM_NTASKS:-$SLURM_JOB_NUM_NODES} / SLURM_JOB_NUM_NODES))}
cpus=$((SLURM_CPUS_ON_NODE > ranks ? SLURM_CPUS_ON_NODE / ranks : 1))
export SLURM_JOB_NUM_NODES=$nodes SLURM_NNODES=$nodes SLURM_NTASKS_PER_NODE=$ranks SLURM_NTASKS=$((nodes * ranks))

# Bind each rank to its own share of the cores. Otherwise its threads, including DALI's, move between sockets. Without
# OMP_NUM_THREADS each rank would start a thread for every core of the node.
export SLURM_CPU_BIND=cores SRUN_CPUS_PER_TASK=$cpus SLURM_CPUS_PER_TASK=$cpus
# Newer versions of Slurm set this to the resources of the batch script's task, and srun refuses it beside the above.
unset SLURM_TRES_PER_TASK
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}

# When a rank dies, the others notice and exit; srun ends those that do not six minutes later. Not earlier, because rank
# 0 waits train.start_timeout_s, five minutes, before it names the node of a rank that did not arrive. Ending the others
# at once (--kill-on-bad-exit) would count ranks that are still exiting as failed whenever a run is asked to stop.
export SLURM_WAIT=360 SLURM_KILL_BAD_EXIT=0

# The package of the checkout goes before an installed one.
export PYTHONPATH="$CIT_SCALE${PYTHONPATH:+:$PYTHONPATH}"

# The ranks meet on the first node. The port follows from job id and restart count, so that two jobs on one node, or two
# starts of one job, use different ports. The range lies below Linux's range of ephemeral ports.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head --lines="$nodes")
MASTER_ADDR=$(head --lines=1 <<< "$hosts")
MASTER_PORT=${MASTER_PORT:-$((20000 + (SLURM_JOB_ID + 7 * ${SLURM_RESTART_COUNT:-0}) % 12000))}
export MASTER_ADDR MASTER_PORT
CIT_HOSTS=${hosts//$'\n'/ }
CIT_LOG=$(readlink "/proc/$$/fd/1")
export CIT_HOSTS CIT_LOG
export SLURM_EXPORT_ENV=ALL # srun passes all variables to the ranks, also under sbatch --export=NONE

# No NCCL_* variables: NCCL's choice of interfaces and algorithms is right on most clusters. If it is wrong on yours,
# set them before sbatch, which passes the environment on.

# The ranks handle Slurm's signals: they save and exit. This shell ignores them, because it must survive to queue the
# job again. ':' rather than '': a signal ignored with '' would be ignored by srun and the ranks as well.
trap ':' TERM INT USR1 USR2
after_the_ranks() {
  code=$?
  # From here on signals are also ignored by requeue.py, which must not be interrupted.
  trap '' TERM INT USR1 USR2
  "${CIT_PYTHON:-python}" "$CIT_SCALE/launchers/requeue.py" --exit-code "$code" \
    --max-restarts "${CIT_MAX_RESTARTS:-3}" -- "$@"
}
trap 'after_the_ranks "$@"' EXIT
