# Where data and runs lie, and whose wandb account is used: source script/set_path.sh [DATA [LOG [ENTITY]]]
# Without arguments, the defaults: data/ and log/ of the present folder, and no entity. What is set already stays.
export DPPO_DATA_DIR="${1:-${DPPO_DATA_DIR:-$PWD/data}}"
export DPPO_LOG_DIR="${2:-${DPPO_LOG_DIR:-$PWD/log}}"
export DPPO_WANDB_ENTITY="${3:-${DPPO_WANDB_ENTITY:-}}"
echo "DPPO_DATA_DIR=$DPPO_DATA_DIR DPPO_LOG_DIR=$DPPO_LOG_DIR DPPO_WANDB_ENTITY=$DPPO_WANDB_ENTITY"
