# shellcheck shell=bash
# Sourced by a batch script in the checkout, whose arguments are those of train.py. Sets how many ranks there are and
# where they meet, and queues the job again at its end if that is right. srun and the ranks read everything from the
# environment, so the line that starts them is a bare "srun python -P -m cit_scale.train".

if [[ -z ${SLURM_JOB_ID:-} ]]; then
  echo "error: this is a batch script; queue it with sbatch" >&2
  exit 2
fi
if [[ ! ${CIT_MAX_RESTARTS:-3} =~ ^[0-9]+$ ]]; then
  echo "error: CIT_MAX_RESTARTS=$CIT_MAX_RESTARTS is no number of failures in a row; write 3 or so" >&2
  exit 2
fi

# Of another job, if this one was queued from within it.
unset CIT_JOB_ID CIT_RESTARTS CIT_HOSTS CIT_GPUS_PER_NODE
CIT_LOG=$(readlink "/proc/$$/fd/1")
CIT_LOG_BEGIN=$(stat --dereference --format=%s "/proc/$$/fd/1" || echo 0) # this start's lines begin there
export CIT_LOG CIT_LOG_BEGIN

# The ranks handle Slurm's signals: they save and exit. This shell survives them, because it has to queue the job again,
# and passes them on, because Slurm may have sent them to it alone (--signal=B:USR2@300, scancel --batch). They are passed
# on as USR2, which srun hands to the ranks: on a TERM it would kill them.
signals=0 stopped=$((128 + $(kill -l USR2))) # the exit code of a rank that is asked to stop too early to save
trap 'signals=$((signals + 1)); [[ -z ${srun_pid:-} ]] || kill -USR2 "$srun_pid" 2> /dev/null' TERM INT USR1 USR2

# In place of the command: bash would keep a signal to itself until a command in the foreground has ended.
srun() {
  local code heard
  ((signals == 0)) || return "$stopped" # before there are ranks
  command srun "$@" &
  srun_pid=$!
  until heard=$signals; wait "$srun_pid"; code=$?; ((signals == heard)); do :; done # a signal ends the wait early
  return $code
}

after_the_ranks() {
  code=$?
  # From here on signals are also ignored by requeue.py, which must not be interrupted.
  trap '' TERM INT USR1 USR2
  rm -f "${host_file:-}"
  "${CIT_PYTHON:-python}" "$CIT_SCALE/launchers/requeue.py" --exit-code "$code" \
    --max-restarts "${CIT_MAX_RESTARTS:-3}" -- "$@"
}
trap 'after_the_ranks "$@"' EXIT

# Not the one of the shell that queued the job where --export=NONE kept that from it. Without it nobody could record how
# the job ends.
if ! "${CIT_PYTHON:-python}" -P -c 'import importlib.util as i; raise SystemExit(not i.find_spec("torch"))' \
  2> /dev/null; then
  ((signals == 0)) || exit "$stopped" # a signal to all that runs ended it
  echo "error: ${CIT_PYTHON:-python} on $SLURMD_NODENAME is missing, older than 3.11 or without torch; queue the job" \
    "with your Python environment active and without --export=NONE, or name its Python:" \
    "--export=CIT_PYTHON=/path/to/python" >&2
  trap - EXIT
  exit 2
fi

# Ranks, cores and the place where they meet, as Slurm knows this job. Fewer nodes than it has are used where the global
# batch is not a multiple of all of them: CIT_NODE_COUNTS lists the possible counts (--min-nodes of submit.py).
host_file=$(mktemp)
facts=$("${CIT_PYTHON:-python}" -P "$CIT_SCALE/launchers/this_job.py" --host-file "$host_file" \
  --node-counts "${CIT_NODE_COUNTS:-}" --ranks-per-node "${CIT_RANKS_PER_NODE:-}") || exit
eval "$facts"
unset CIT_NODE_COUNTS CIT_RANKS_PER_NODE

# When a rank dies, the others notice and exit; srun ends those that do not six minutes later. Not earlier, because rank
# 0 waits train.start_timeout_s, five minutes, before it names the node of a rank that did not arrive. Ending the others
# at once (--kill-on-bad-exit) would count ranks that are still exiting as failed whenever a run is asked to stop.
export SLURM_WAIT=360 SLURM_KILL_BAD_EXIT=0
export SLURM_EXPORT_ENV=ALL # srun passes all variables to the ranks, also under sbatch --export=NONE

# The package of the checkout goes before an installed one.
export PYTHONPATH="$CIT_SCALE${PYTHONPATH:+:$PYTHONPATH}"

# No NCCL_* variables: NCCL's choice of interfaces and algorithms is right on most clusters. If it is wrong on yours,
# set them before sbatch, which passes the environment on.
