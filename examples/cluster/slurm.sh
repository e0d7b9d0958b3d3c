#!/bin/bash
# Trains on several nodes under Slurm until it is done: it is queued again when its time is up, when it is preempted
# and when a node fails, and goes on from its newest checkpoint.
#
#   DATA=/shared/books RUN=/shared/runs/3b sbatch examples/cluster/slurm.sh --set milestone_every=5000
#
# Needs an environment in which `torchrun` finds longread, and DATA and RUN where all nodes see them.
#SBATCH --job-name=longread
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=longread-%j.log
# Three minutes before the end of the time this script is told, to leave the step, save and queue itself again.
#SBATCH --signal=B:TERM@180

set -u
: "${DATA:?is what longread prepare wrote}" "${RUN:?is where the run goes}"
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# How long torchrun waits for ranks that it has asked to stop; 30 seconds if it does not know the variable.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150

STOPPED=
trap 'STOPPED=yes; kill -TERM ${!:-}' TERM # srun passes it on to torchrun, and that to the ranks

# A rank that fails is started again with all others. --resume is right from the first time on: it begins a new run too.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-endpoint "$FIRST:29500" \
    -m longread train 3b --data "$DATA" --out "$RUN" --resume "$@" &
wait $!
STATUS=$?
while [ $STATUS -gt 128 ] && kill -0 $! 2>/dev/null; do # it was the signal that ended the waiting
    wait $!
    STATUS=$?
done
[ -z "$STOPPED" ] || [ $STATUS -eq 0 ] || exec scontrol requeue "$SLURM_JOB_ID"
exit $STATUS # a run that failed is not queued again
