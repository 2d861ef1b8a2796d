#!/bin/bash
# Train under Slurm, and go on by itself after a pre-emption or the end of the time:
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

# Five minutes before its end this script gets SIGUSR1 and hands it on. All processes then save after the same step and
# exit with 75, and the job goes back into the queue. srun starts one process for each GPU: torchrun or accelerate launch
# would do, but turn 75 into 1, and leave 30 s for the save when they are signalled. With them, in place of srun … below:
#   srun --ntasks-per-node=1 torchrun --nnodes="$SLURM_NNODES" --nproc-per-node=gpu --rdzv-backend=c10d \
#        --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" scripts/train.py "$@" &
# Where the hosts' names lead to 127.0.1.1, set GLOO_SOCKET_IFNAME to the network's interface.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) WORLD_SIZE=$SLURM_NTASKS
export AGAIN=$PWD/.requeue-$SLURM_JOB_ID  # is there when a process has asked for another start
rm -f "$AGAIN"

ended() {  # the exit code of a child, whatever signals this shell gets meanwhile
    wait "$1"
    local code=$?
    while [ "$code" -gt 128 ] && kill -0 "$1" 2>/dev/null; do  # the signal ended the wait, not the child
        wait "$1"
        code=$?
    done
    if [ "$code" -gt 128 ]; then  # or the child ended between the two
        wait "$1"
        local last=$?
        [ "$last" -eq 127 ] || code=$last
    fi
    return "$code"
}

task() {  # one process; its 75 becomes a file, as srun kills the others when the first one ends with anything but 0
    trap 'kill -USR1 "$process" 2>/dev/null' USR1
    trap 'kill -TERM "$process" 2>/dev/null' TERM
    RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID python scripts/train.py "$@" &
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
