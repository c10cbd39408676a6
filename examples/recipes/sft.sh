#!/usr/bin/env bash
# Supervised fine-tuning on FSDP2: verl's own sft_trainer on the GPUs of one machine.  For verl 0.7.0 to 0.9.1.
#
#   MODEL=FOLDER DATA=FILE.parquet GPUS=8 bash examples/recipes/sft.sh [OVERRIDE ...]
#
# Each variable below may be set from outside; what stands behind the script's name goes to verl as it is.
# Without a GPU: VERL_FL_DEVICE=cpu GPUS=2 bash examples/recipes/sft.sh, slowly.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/checks.sh"

: "${MODEL:=$PWD/out/arithmetic/model}"        # a folder in Hugging Face's format
: "${DATA:=$PWD/out/arithmetic/train.parquet}" # chats: a column messages of roles and contents
: "${VAL:=$PWD/out/arithmetic/val.parquet}"    # the same, to validate with
: "${OUT:=$PWD/out/sft}"                       # for log, reports and checkpoints
: "${GPUS:=1}"                                 # processes, one a GPU
: "${LENGTH:=512}"                             # tokens of a chat at most; a longer one is an error
: "${BATCH:=64}"                               # chats in a step
: "${TOKENS:=8192}"                            # in a micro-batch: bounds the memory that training takes
: "${LR:=1e-5}"                                # learning rate
: "${EPOCHS:=1}"                               # times through the data
: "${TEST:=20}"                                # steps between validations
: "${SAVE:=100}"                               # steps between checkpoints; the last step has one too

absolute MODEL DATA VAL OUT
check_model_and_files "$MODEL" DATA "$DATA" VAL "$VAL"
check_modules verl verl_fl_overlay torch

overrides=(
    "data.train_files=$DATA"
    "data.val_files=$VAL"
    "data.train_batch_size=$BATCH"
    "data.max_length=$LENGTH"
    "data.max_token_len_per_gpu=$TOKENS"          # micro-batches by tokens, verl's default
    "model.path=$MODEL"
    engine=fsdp
    engine.strategy=fsdp2                         # verl's default is FSDP1
    "optim.lr=$LR"
    "trainer.n_gpus_per_node=$GPUS"
    'trainer.logger=[console]'                    # verl's default adds wandb, which asks for a login
    trainer.project_name=sft
    trainer.experiment_name=sft
    "trainer.total_epochs=$EPOCHS"
    "trainer.test_freq=$TEST"
    "trainer.save_freq=$SAVE"
    "trainer.default_local_dir=$OUT/checkpoints"  # a run that finds checkpoints there goes on from them
    "hydra.run.dir=$OUT/hydra"
)
processes=(-m torch.distributed.run --standalone "--nproc_per_node=$GPUS")
train python "${processes[@]}" -m verl.trainer.sft_trainer "${overrides[@]}" "$@"
