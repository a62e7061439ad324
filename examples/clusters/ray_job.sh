#!/usr/bin/env bash
# Submits one of the configurations beside this file to a running Ray cluster, and follows its log.
#
#   RAY_ADDRESS=http://HEAD:8265 examples/clusters/ray_job.sh MODEL [+precision=fp8] [KEY=VALUE]...
#
# MODEL is qwen3-30b-a3b, mixtral-8x7b or deepseek-v3; KEY=VALUE are verl's, e.g. data.train_files=/shared/train.parquet. This directory is
# uploaded with the job; data, checkpoints and Python packages have to be on the nodes.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
model="${1:?usage: ray_job.sh MODEL [KEY=VALUE]...}"
shift
if [[ ! -f "${here}/${model}.yaml" ]]; then
    echo "ray_job.sh: no configuration ${here}/${model}.yaml" >&2
    exit 2
fi
: "${RAY_ADDRESS:?set RAY_ADDRESS to the dashboard of the cluster, http://HEAD:8265}"

# Refuses a layout that cannot be trained within seconds instead of after loading the model on every GPU.
megatron-pr2 plan --config "${here}/${model}.yaml" --json >/dev/null

# The job runs in the uploaded directory.
exec ray job submit --address "${RAY_ADDRESS}" --working-dir "${here}" --runtime-env "${here}/ray_job.yaml" -- \
    python3 -m verl.trainer.main_ppo --config-dir . --config-name "${model}" "$@"
