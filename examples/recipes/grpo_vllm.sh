#!/usr/bin/env bash
# GRPO with answers from vLLM: verl's own main_ppo on FSDP2, one GPU or many.  For verl 0.7.1 to 0.9.1.
#
#   MODEL=FOLDER DATA=FILE.parquet REWARD=FILE.py bash examples/recipes/grpo_vllm.sh [OVERRIDE ...]
#
# Each variable below may be set from outside; what stands behind the script's name goes to verl as it is.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/checks.sh"

: "${MODEL:=$PWD/out/arithmetic/model}"           # a folder in Hugging Face's format
: "${DATA:=$PWD/out/arithmetic/problems.parquet}" # questions, with verl's columns
: "${VAL:=$DATA}"                                 # the same, to validate with: add trainer.test_freq=10
: "${REWARD:=$PWD/examples/arithmetic.py}"        # has a function REWARD_NAME; null: verl's own for the data_source
: "${REWARD_NAME:=reward}"                        # what that function is called
: "${OUT:=$PWD/out/grpo_vllm}"                    # for log, reports and checkpoints
: "${NODES:=1}"                                   # machines of the Ray cluster
: "${GPUS:=1}"                                    # on each of them
: "${TP:=1}"                                      # GPUs that share one copy of vLLM
: "${VLLM_MEMORY:=0.4}"                           # vLLM's part of a GPU's memory while it answers
: "${PROMPT:=256}"                                # tokens of a question at most
: "${RESPONSE:=256}"                              # tokens of an answer at most
: "${BATCH:=64}"                                  # questions in a step
: "${ANSWERS:=8}"                                 # to each question
: "${TOKENS:=16384}"                              # in a micro-batch: bounds the memory that training takes
: "${LR:=1e-6}"                                   # learning rate
: "${EPOCHS:=1}"                                  # times through the data
: "${SAVE:=50}"                                   # steps between checkpoints; -1: none

absolute MODEL DATA VAL OUT
check_model_and_files "$MODEL" DATA "$DATA" VAL "$VAL"
if [[ $REWARD != null ]]; then
    absolute REWARD
    check_model_and_files "$MODEL" REWARD "$REWARD"
fi
check_modules verl verl_fl_overlay vllm ray
verl=$(python -c 'from importlib.util import find_spec; print(*find_spec("verl").submodule_search_locations)')
[[ ! -d $verl/trainer/ppo/v1 ]] || check_modules transfer_queue # the trainer of 0.9 keeps its data there

overrides=(
    algorithm.adv_estimator=grpo
    "data.train_files=$DATA"
    "data.val_files=$VAL"
    "data.train_batch_size=$BATCH"
    "data.max_prompt_length=$PROMPT"
    "data.max_response_length=$RESPONSE"
    "reward.custom_reward_function.path=$REWARD"
    "reward.custom_reward_function.name=$REWARD_NAME"
    "actor_rollout_ref.model.path=$MODEL"
    actor_rollout_ref.actor.strategy=fsdp2
    "actor_rollout_ref.actor.ppo_mini_batch_size=$BATCH"         # one update a step: on-policy
    actor_rollout_ref.actor.use_dynamic_bsz=True                 # micro-batches by tokens, not by rows
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=$TOKENS"  # the log-prob passes take the same
    actor_rollout_ref.actor.use_kl_loss=True                     # needs a reference; its coefficient is verl's 0.001
    "actor_rollout_ref.actor.optim.lr=$LR"
    actor_rollout_ref.rollout.name=vllm
    "actor_rollout_ref.rollout.n=$ANSWERS"
    "actor_rollout_ref.rollout.tensor_model_parallel_size=$TP"   # verl's default is 2
    "actor_rollout_ref.rollout.gpu_memory_utilization=$VLLM_MEMORY"
    "trainer.nnodes=$NODES"
    "trainer.n_gpus_per_node=$GPUS"
    'trainer.logger=[console]'                                   # verl's default adds wandb, which asks for a login
    trainer.val_before_train=False
    "trainer.total_epochs=$EPOCHS"
    "trainer.save_freq=$SAVE"
    "trainer.default_local_dir=$OUT/checkpoints"                 # a run that finds checkpoints there goes on from them
    "hydra.run.dir=$OUT/hydra"
)
train python -m verl.trainer.main_ppo "${overrides[@]}" "$@"
