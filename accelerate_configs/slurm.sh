#!/usr/bin/env bash
# Data parallel on several machines of a cluster under SLURM, one process a GPU. Before the time limit the state is saved
# and the job queued again; it resumes where it stopped, until the training is done.
#   sbatch accelerate_configs/slurm.sh config=imagenet_256/dit_xl2 train_batch_size=16 output_dir=/shared/runs/dit_xl2
# The 256 images of a step are 32 on each of 8 GPUs, and 16 on each of these 16.
# All machines must see output_dir; cache_dir may be each machine's own. Numbers of your cluster go here or to sbatch.
#SBATCH --job-name=speed
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# Five minutes before the limit, to this script alone, which passes it on: enough for a save to a slow disk.
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

train=${TRAIN:-train_scripts/train_dit_speed.py}
# The first machine keeps the store by which the processes find one another, at a port of the job's own.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) || exit 1
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} ACCELERATE_MIXED_PRECISION=${ACCELERATE_MIXED_PRECISION:-bf16}
# From SLURM 22.05 on srun no longer takes this over from the job, and each process would have one core.
export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-1}}

# srun starts the processes themselves. torchrun in between would kill them 30 seconds after it has passed a signal on,
# in the midst of a large save, and hide the exit code that says why they stopped. --wait: for those that wait in vain
# for one that has failed; no longer than ddp_timeout.
srun --kill-on-bad-exit=0 --wait=600 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
    exec python "$@"' train "$train" "$@" resume_from_checkpoint=latest &
step=$!

# srun gives all processes the signal that it receives. They agree on a step, save it, and end with 128 + the signal.
pass_on() {
    interrupted=yes
    kill "-$1" "$step" 2>/dev/null
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM
# A signal ends the waiting, not what is waited for.
while interrupted=; wait "$step"; status=$?; [[ -n $interrupted ]]; do :; done

if ((status == 128 + $(kill -l USR1))); then
    echo "The time is up; job $SLURM_JOB_ID is queued again."
    scontrol requeue "$SLURM_JOB_ID"
    exit
fi
exit "$status"
