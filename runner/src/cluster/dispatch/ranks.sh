# Ranks meet at the address under which Slurm itself reaches their first node, and at a port that no earlier start of the
# job still holds.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol --oneliner show node "$first" | grep -o 'NodeAddr=[^ ]*')
address=${address#NodeAddr=}
export MASTER_ADDR=${address:-$first}
if [ -z "$MASTER_ADDR" ]; then
    echo "scontrol does not say on which nodes this job runs: is it on the PATH of compute nodes?" >&2
    exit 1
fi
export MASTER_PORT=$((10000 + (SLURM_JOB_ID * 8 + ${SLURM_RESTART_COUNT:-0} % 8) % 22000))
# srun does not take this over from sbatch.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
