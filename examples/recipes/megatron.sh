#!/usr/bin/env bash
# GRPO with Megatron's engine: grpo_vllm.sh for models that one GPU does not hold.  For verl 0.8.0 to 0.9.1.
#
#   MODEL=FOLDER DATA=FILE.parquet REWARD=FILE.py GPUS=8 TP=4 bash examples/recipes/megatron.sh [OVERRIDE ...]
#
# The variables are those of grpo_vllm.sh, where they are explained, and PP.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/checks.sh"

export OUT=${OUT:-$PWD/out/megatron}
export NODES=${NODES:-1}
export GPUS=${GPUS:-2}
export TP=${TP:-2} # GPUs that share each layer, in vLLM and in Megatron
: "${PP:=1}"       # stages that share the layers among them

((NODES * GPUS % (TP * PP) == 0)) || fail "NODES=$NODES times GPUS=$GPUS is no multiple of TP=$TP times PP=$PP"
check_modules megatron mbridge

overrides=(
    model_engine=megatron
    actor_rollout_ref.actor.strategy=megatron
    actor_rollout_ref.model.use_remove_padding=True                   # packed, as with FSDP
    "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=$TP" # the reference takes the actor's
    "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=$PP"
    actor_rollout_ref.actor.megatron.vanilla_mbridge=True             # mbridge; 0.9 would take Megatron-Bridge,
    actor_rollout_ref.ref.megatron.vanilla_mbridge=True               # a package that needs TransformerEngine
)
exec bash "$here/grpo_vllm.sh" "${overrides[@]}" "$@"
