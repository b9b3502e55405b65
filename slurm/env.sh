# shellcheck shell=bash
# Sourced by a batch script in the checkout, with the arguments of train.py as the script's own: how many ranks there
# are, where they meet, and what becomes of the job when they have ended. All of it is read by srun and by the ranks
# from the environment, so the line that starts them is a bare "srun python cit_scale/train.py".

# Fewer nodes than were allotted are used where only so many cut the global batch evenly (--min-nodes of submit.py).
nodes=$SLURM_JOB_NUM_NODES
for count in ${CIT_NODE_COUNTS:-$nodes}; do
  if (( count <= nodes )); then
    nodes=$count
    break
  fi
done
# One rank per GPU; where there are none, as many as --ntasks-per-node or --ntasks says, or one on each node.
gpus=${SLURM_GPUS_ON_NODE:-0}
ranks=${SLURM_NTASKS_PER_NODE:-$((gpus > 0 ? gpus : ${SLURM_NTASKS:-$SLURM_JOB_NUM_NODES} / SLURM_JOB_NUM_NODES))}
cpus=$((SLURM_CPUS_ON_NODE > ranks ? SLURM_CPUS_ON_NODE / ranks : 1))
export SLURM_JOB_NUM_NODES=$nodes SLURM_NNODES=$nodes SLURM_NTASKS_PER_NODE=$ranks SLURM_NTASKS=$((nodes * ranks))

# Each rank keeps to its own share of the cores. Without that its threads, those of DALI among them, wander between
# sockets; without OMP_NUM_THREADS every rank would start a thread for each core that it may use or not.
export SLURM_CPU_BIND=cores SRUN_CPUS_PER_TASK=$cpus SLURM_CPUS_PER_TASK=$cpus
unset SLURM_TRES_PER_TASK # newer Slurms say there what a task of the batch script has, and srun refuses two answers
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}

# When a rank dies, the others notice and leave; those that do not are ended six minutes later. Not before: rank 0 waits
# for train.start_timeout_s, five minutes, before it names the node of a rank that did not arrive. Ending them at once,
# as --kill-on-bad-exit would, takes ranks that have not left yet for failed whenever a run is asked to stop.
export SLURM_WAIT=360 SLURM_KILL_BAD_EXIT=0

# The ranks meet on the first node, at a port that two jobs on one node do not share, nor two starts of one job; the
# range is below the one from which Linux gives ports to programs that do not care.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head --lines="$nodes")
MASTER_ADDR=$(head --lines=1 <<< "$hosts")
MASTER_PORT=${MASTER_PORT:-$((20000 + (SLURM_JOB_ID + 7 * ${SLURM_RESTART_COUNT:-0}) % 12000))}
export MASTER_ADDR MASTER_PORT
CIT_HOSTS=${hosts//$'\n'/ }
CIT_LOG=$(readlink "/proc/$$/fd/1")
export CIT_HOSTS CIT_LOG
export SLURM_EXPORT_ENV=ALL # to the ranks, also where sbatch was told to export nothing

# No NCCL_* here: its choice of interfaces and algorithms is right on most clusters, and what is wrong with it on yours
# cannot be known. Set it before sbatch, which passes the environment on.

# Slurm's signals are for the ranks, which save and leave. This shell has to live on to send the job back to the queue.
trap ':' TERM INT USR1 USR2
after_the_ranks() {
  code=$?
  trap '' TERM INT USR1 USR2
  "${CIT_PYTHON:-python}" "$CIT_SCALE/launchers/requeue.py" --exit-code "$code" \
    --max-restarts "${CIT_MAX_RESTARTS:-3}" -- "$@"
}
trap 'after_the_ranks "$@"' EXIT
