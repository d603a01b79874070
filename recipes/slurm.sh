#!/bin/bash
# A run under Slurm, on as many hosts as --nodes says; resources can be overridden on the command line:
#   sbatch --nodes 2 recipes/slurm.sh recipes/run_distill.py recipes/imagenet/deit_base_distilled.yaml --per_device_train_batch_size 64
#
# srun starts one process per GPU, without accelerate or torchrun in between: so SIGTERM (preemption, or five minutes
# before the time limit) reaches the run, which saves and exits with status 75, "start me again", from its first import to
# its last upload; and the status reaches this script, which puts the job back into the queue. The run then goes on from its last checkpoint. Any other status is final.
#
#SBATCH --job-name=deit
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append

# What torch.distributed and accelerate read in place of a launcher's and a configuration file's.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
export ACCELERATE_MIXED_PRECISION=${ACCELERATE_MIXED_PRECISION:-bf16}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Once a process has ended, however it did, the others have a minute.
srun --kill-on-bad-exit=0 --wait=60 \
    bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec python "$@"' run "$@"
status=$?

if [ "$status" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
