# shellcheck shell=bash
# What the recipes beside this file share: what they check before they start, and what they tell at the end.

fail() {
    echo "${0##*/}: $*" >&2
    exit 2
}

# Makes the paths in these variables absolute: verl's processes start in other folders.
absolute() {
    local name
    for name in "$@"; do
        printf -v "$name" %s "$(realpath -m "${!name}")"
    done
}

# The model's folder, and after it files: the name of the variable and its value, in turns.
check_model_and_files() {
    [[ -f $1/config.json ]] || fail "MODEL=$1 has no config.json: give the folder of a model in Hugging Face's format"
    shift
    while (($#)); do
        [[ -f $2 ]] || fail "$1=$2 is no file; 'python examples/arithmetic.py out/arithmetic' makes the one of the default"
        shift 2
    done
}

# Modules that training imports, before minutes are spent on a start that fails.
check_modules() {
    command -v python >/dev/null || fail "there is no 'python' here: activate the environment in which verl runs"
    local missing
    missing=$(python -c 'import sys; from importlib.util import find_spec
print(*(name for name in sys.argv[1:] if not find_spec(name)))' "$@")
    [[ -z $missing ]] || fail "$(command -v python) cannot import: $missing (docs/training.md says what to install)"
}

# Brings the overlay in, asks it whether it fits, trains with the command in "$@", and sums up what every process did.
train() {
    export VERL_USE_EXTERNAL_MODULES=verl_fl_overlay
    export VERL_FL_REPORT_DIR=$OUT/reports
    mkdir -p "$OUT/reports" || fail "OUT=$OUT cannot be written"
    rm -f "$OUT"/reports/*.json # of an earlier run
    python -m verl_fl_overlay doctor >"$OUT/doctor.txt" 2>&1 || {
        tail -n 15 "$OUT/doctor.txt" >&2
        fail "the overlay would not train here; all that it found: $OUT/doctor.txt"
    }
    local status=0
    "$@" 2>&1 | tee "$OUT/train.log" || status=$?
    ((status == 0)) || fail "training failed with exit status $status; its log: $OUT/train.log"
    echo "log: $OUT/train.log, checkpoints: $OUT/checkpoints; what every process did:"
    python -m verl_fl_overlay doctor --reports "$OUT/reports"
}
