#!/bin/bash
# Stands in for train.py on a cluster: says what its rank was told, and ends as CIT_STAND_IN wants it to.
#
#   ends     at once, and well
#   stops    waits at the first start for a signal, after which it stops as a run does; ends at later ones
#   fails    at each start
#   fails-N  at the first N starts
#   unfit    its node fails the check at the first two starts
stop() {
  echo "rank $SLURM_PROCID is asked to stop by $1"
  kill %% 2> /dev/null
  sleep 1 # as long as it takes to save
  echo "rank $SLURM_PROCID has saved"
  exit 75
}
for signal in TERM INT USR1 USR2; do trap "stop $signal" "$signal"; done
echo "rank $SLURM_PROCID of $SLURM_NTASKS on $SLURMD_NODENAME: start $CIT_RESTARTS of $CIT_JOB_ID," \
  "$SLURM_CPUS_PER_TASK cores, $OMP_NUM_THREADS threads, $CIT_GPUS_PER_NODE GPUs, meets at $MASTER_ADDR"
case ${CIT_STAND_IN:-ends} in
stops)
  if [[ $CIT_RESTARTS == 0 ]]; then
    while true; do # Slurm may signal the sleep first
      sleep 300 &
      wait
    done
  fi
  ;;
fails) exit 1 ;;
unfit)
  ((CIT_RESTARTS < 2)) || exit 0
  run_dir=${*: -3:1}/${*: -1} # the last arguments are --runs_dir DIR --name NAME
  mkdir -p "$run_dir"
  echo "{\"job_id\": \"$CIT_JOB_ID\", \"node\": \"$SLURMD_NODENAME\", \"reason\": \"none\"}" >> "$run_dir/unfit_nodes.jsonl"
  exit 8
  ;;
fails-*) ((CIT_RESTARTS >= ${CIT_STAND_IN#fails-})) || exit 1 ;;
esac
