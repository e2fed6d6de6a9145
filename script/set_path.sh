# Says where data and runs lie, for this shell and what it starts: source script/set_path.sh (bash, zsh or sh)
# It asks in an interactive shell. Elsewhere it takes what is set already, else data/ and log/ of this repository.

if [ -n "${ZSH_VERSION:-}" ]; then
    eval '_dppo_script=${(%):-%x}'
else
    _dppo_script=${BASH_SOURCE:-script/set_path.sh}
fi
_dppo_root=$(cd "$(dirname "$_dppo_script")/.." && pwd)

_dppo_answer() { # question, default: prints the answer
    _dppo_line=
    case $- in
        *i*) if [ -t 0 ]; then
            printf '%s [%s]: ' "$1" "${2:-none}" >&2
            IFS= read -r _dppo_line || true
        fi ;;
    esac
    case $_dppo_line in
        '') printf '%s\n' "$2" ;;
        '~' | '~/'*) printf '%s\n' "$HOME${_dppo_line#\~}" ;;
        *) printf '%s\n' "$_dppo_line" ;;
    esac
}

export DPPO_DATA_DIR DPPO_LOG_DIR DPPO_WANDB_ENTITY
DPPO_DATA_DIR=$(_dppo_answer "Data directory" "${DPPO_DATA_DIR:-$_dppo_root/data}")
DPPO_LOG_DIR=$(_dppo_answer "Directory of runs" "${DPPO_LOG_DIR:-$_dppo_root/log}")
DPPO_WANDB_ENTITY=$(_dppo_answer "wandb user or team" "${DPPO_WANDB_ENTITY:-}")
printf '%s\n' "DPPO_DATA_DIR=$DPPO_DATA_DIR" "DPPO_LOG_DIR=$DPPO_LOG_DIR" "DPPO_WANDB_ENTITY=$DPPO_WANDB_ENTITY"
if [ -z "${ZSH_VERSION:-}" ] && [ "${0##*/}" = set_path.sh ]; then
    echo "nothing is set: this shell ends here; write: source script/set_path.sh" >&2
fi

unset -f _dppo_answer
unset _dppo_script _dppo_root
