#!/usr/bin/env bash
# A run as a Slurm job: conf/zephyr7b_8gpu.yaml on two nodes of four GPUs. The first node is Ray's head and learns, the other one samples.
#
#   PROFILE=gpu make setup              # once, on a disk that all nodes see
#   sbatch cluster/slurm.sh             # from the checkout; the job's output goes to slurm-JOB.out
#   scancel --batch --signal=TERM JOB   # ends it in good order: the step is finished and saved. sbatch again goes on
#
# Fill in:
#   <PARTITION>      of nodes with GPUs of 80 GB
#   <ACCOUNT>        that pays
#   <SHARED-FOLDER>  on a disk that all nodes see, for run directories and models from the hub
#
# Ten minutes before the time limit the run is saved and the job queued again. Slurm queues it again when a node fails, or when others need
# the nodes. The same command then goes on. Plain `scancel JOB` tells Ray's processes at the same time as the run, and Slurm kills all of
# them after KillWait (30 s): what is finished stays, steps since the last saved progress (learner.checkpoint_every_steps) are lost.
#
# More keys: `sbatch cluster/slurm.sh spin.num_iterations=2`. More nodes: the first LEARNER_NODES learn, the others sample;
# sampler.num_replicas and learner.num_workers must fit. One node holds both players, without labels. ~/.ray/auth_token must be the same on
# all nodes, as in a shared home. Secrets are files that only you can read: ~/secrets/WANDB_API_KEY, ~/secrets/HF_TOKEN, if they are there.
# Tested with stand-ins for Slurm and Ray; not yet run on a Slurm cluster.
#SBATCH --job-name=spin-ray
#SBATCH --partition=<PARTITION>
#SBATCH --account=<ACCOUNT>
#SBATCH --nodes=2
#SBATCH --gpus-per-node=4
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

LEARNER_NODES=1
shared="<SHARED-FOLDER>"
run=(conf/zephyr7b_8gpu.yaml "run.dir=$shared/runs" "$@")
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  run+=(sampler.label_selector.role=sampler learner.label_selector.role=learner)
fi

cd "$SLURM_SUBMIT_DIR"
export PATH=$PWD/.venv/bin:$PATH HF_HOME=$shared/huggingface LEARNER_NODES
export RAY_AUTH_MODE=token RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=900  # nodes that come up slowly; Ray's own 30 s are too few
for name in WANDB_API_KEY HF_TOKEN; do
  if [ -r ~/secrets/$name ]; then export "$name=$(cat ~/secrets/$name)"; fi
done
[ -s ~/.ray/auth_token ] || ray get-auth-token --generate >/dev/null  # before two nodes make one each

# By number: a node's own name may mean 127.0.0.1 on it, and Ray would not know that it is the head. Of several networks the first one.
head=$(hostname --all-ip-addresses | cut -d' ' -f1):6379
driver=${TMPDIR:-/tmp}/spin-ray-$SLURM_JOB_ID.pid  # this script runs on the first node, as the driver does

# Every node starts its part of Ray, with its own label; the first one then runs what stands behind `--`. The driver's shell leaves its
# number where this script finds it.
# shellcheck disable=SC2016,SC2329  # that shell fills its words in; srun calls this
on_each_node() {
  local labels=()
  if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    if [ "$SLURM_NODEID" -lt "$LEARNER_NODES" ]; then labels=(--labels=role=learner); else labels=(--labels=role=sampler); fi
  fi
  exec ray symmetric-run --address "$1" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="$SLURM_GPUS_ON_NODE" "${labels[@]}" -- \
    bash -c 'echo $$ >"$0"; export RAY_ADDRESS=$1; shift; exec python -m spin_ray run "$@"' "$2" "$1" "${@:3}"
}
export -f on_each_node

again=
# Only the driver is told: it needs Ray to save what it has.
# shellcheck disable=SC2329  # a signal calls it
end() {
  if [ -s "$driver" ]; then kill -TERM "$(cat "$driver")" 2>/dev/null || true; else kill -TERM "$nodes" 2>/dev/null || true; fi
}
trap 'again=yes; end' USR1
trap end TERM

rm -f "$driver"
# shellcheck disable=SC2016  # the nodes' shells fill this in
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \
  --cpu-bind=none --kill-on-bad-exit=1 --wait=0 bash -c 'on_each_node "$@"' node "$head" "$driver" "${run[@]}" &
nodes=$!
while kill -0 "$nodes" 2>/dev/null; do wait "$nodes" || true; done  # a signal ends a `wait`, not what is waited for
code=0
wait "$nodes" || code=$?
rm -f "$driver"

# 130: the run was interrupted, and has saved itself. Slurm shows the highest exit code of all nodes.
if [ -n "$again" ] && [ "$code" -ne 0 ]; then
  echo "out of time (exit code $code): queued again, to go on"
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
