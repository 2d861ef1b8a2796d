#!/bin/bash
# Train under Slurm; the job requeues itself after a pre-emption or at the end of its time:
#   sbatch scripts/slurm.sh CONFIG [key=value …]
#SBATCH --job-name=pixart
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

# Five minutes before its end this script receives SIGUSR1 and passes it on. All processes then save after the same step
# and exit with 75, and the job is requeued. srun starts one process per GPU. torchrun and accelerate launch work, too, but
# they replace exit code 75 by 1 and allow 30 s for the save when they receive a signal. To use them instead of srun below:
#   srun --ntasks-per-node=1 torchrun --nnodes="$SLURM_NNODES" --nproc-per-node=gpu --rdzv-backend=c10d \
#        --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" -m pixart train "$@" &
# If host names resolve to 127.0.1.1, set GLOO_SOCKET_IFNAME to the network interface.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) WORLD_SIZE=$SLURM_NTASKS
export AGAIN=$PWD/.requeue-$SLURM_JOB_ID  # exists if a process has asked to be requeued
rm -f "$AGAIN"

ended() {  # wait for a child's exit code, although signals to this shell interrupt `wait`
    wait "$1"
    local code=$?
    while [ "$code" -gt 128 ] && kill -0 "$1" 2>/dev/null; do  # a signal interrupted `wait`; the child still runs
        wait "$1"
        code=$?
    done
    if [ "$code" -gt 128 ]; then  # the child may have ended in the meantime
        wait "$1"
        local last=$?
        [ "$last" -eq 127 ] || code=$last
    fi
    return "$code"
}

task() {  # one process; exit code 75 becomes a file, because srun kills the others if one ends with a non-zero code
    trap 'kill -USR1 "$process" 2>/dev/null' USR1
    trap 'kill -TERM "$process" 2>/dev/null' TERM
    RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID python -m pixart train "$@" &
    process=$!
    ended "$process"
    local code=$?
    if [ "$code" -eq 75 ] && touch "$AGAIN"; then
        exit 0
    fi
    exit "$code"
}
export -f ended task

trap 'scancel --signal=USR1 "$SLURM_JOB_ID"' USR1  # to the processes, not to this script
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c 'task "$@"' _ "$@" &
ended $!
code=$?
[ -e "$AGAIN" ] && [ "$code" -eq 0 ] && code=75
rm -f "$AGAIN"
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
