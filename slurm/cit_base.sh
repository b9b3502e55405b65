#!/bin/bash
# CiT-B on two nodes of eight GPUs. Run in the checkout, with its Python environment active; whatever stands here is
# overridden on the command line, and what follows the script's name goes to train.py:
#
#   sbatch --partition=NAME slurm/cit_base.sh --data.train DIR --data.eval DIR
#   sbatch --nodes=2 --gpus-per-node=0 --cpus-per-task=16 slurm/cit_base.sh --config digits
#
# The cores are those of a node, which its ranks share; so is the memory, of which 0 is all. Not --exclusive: Slurm 22.05
# never starts such a job again when it has lost a node (BadConstraints).
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
# No --time: under whatever limit the partition has, the run saves before it, queues again and goes on.

export CIT_SCALE=${CIT_SCALE:-$SLURM_SUBMIT_DIR}
set -- --config cit_base "$@"
source "$CIT_SCALE/slurm/env.sh" || { echo "error: run sbatch in the checkout, or set CIT_SCALE to it" >&2; exit 2; }
srun "${CIT_PYTHON:-python}" "$CIT_SCALE/cit_scale/train.py" "$@"
