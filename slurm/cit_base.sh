#!/bin/bash
# CiT-B on two nodes of eight GPUs. Run in the checkout, with its Python environment active. Options before the
# script's name override the #SBATCH lines below, and arguments after it go to train.py:
#
#   sbatch --partition=NAME slurm/cit_base.sh --data.train DIR --data.eval DIR
#   sbatch --nodes=2 --gpus-per-node=0 --cpus-per-task=16 slurm/cit_base.sh --config digits
#
# --cpus-per-task is the number of cores of a node, which its ranks share; --mem=0 is all of its memory. Not
# --exclusive: Slurm 22.05 never starts such a job again after it has lost a node (BadConstraints).
#
#SBATCH --job-name=cit_base
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=USR2@300
# USR2@300: Slurm sends SIGUSR2 to the ranks 300 s before the time limit; the run then saves and is queued again.
# No --time: the limit of the partition applies. USR2 and not USR1, which some plugins of NCCL catch.

if [[ -z ${CIT_SCALE:-} ]]; then
  CIT_SCALE=$SLURM_SUBMIT_DIR
  [[ -e $CIT_SCALE/slurm/env.sh ]] || CIT_SCALE=$("${CIT_PYTHON:-python}" -P -m cit_scale where) # an installed package
fi
set -- --config cit_base "$@"
source "$CIT_SCALE/slurm/env.sh" || { echo "error: run sbatch in the checkout, set CIT_SCALE to it, or install the package" >&2; exit 2; }
# -P: the package is that of $CIT_SCALE, whatever the folder of submission holds.
srun "${CIT_PYTHON:-python}" -P -m cit_scale.train "$@"
