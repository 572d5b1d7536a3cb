#!/usr/bin/env bash
# Everything that wants a GPU, from a bare checkout, with the Python and the torch that are there.
#
#   benchmarks/gpu.sh --out DIR [--minutes 9] [--device cuda] [--shapes default] [--only doctor,tests,check,bench,sanitizer]
#
# Each part has a share of the minutes and is ended at its end; what it had found by then is kept. In DIR: summary.md,
# doctor.json, tests.txt, check.json, the machine's CSV, sanitizer.txt, and pictures. --device cpu is a rehearsal.
set -uo pipefail

out="" minutes=9 device=cuda shapes=default only=doctor,tests,check,bench,sanitizer python=${PYTHON:-python3}
while [ $# -gt 0 ]; do
    case "$1" in
        --out) out=$2 ;;
        --minutes) minutes=$2 ;;
        --device) device=$2 ;;
        --shapes) shapes=$2 ;;
        --only) only=$2 ;;
        *)
            echo "benchmarks/gpu.sh: unknown option $1: see the head of the file" >&2
            exit 2
            ;;
    esac
    shift 2
done
[ -n "$out" ] || { echo "benchmarks/gpu.sh: --out DIR is where the results go" >&2; exit 2; }
mkdir -p "$out" && out=$(cd "$out" && pwd) && cd "$(dirname "$0")/.." || exit 2

export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1
if [ "$device" = cuda ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "benchmarks/gpu.sh: the torch of $python sees no GPU; --device cpu rehearses without one" >&2
    exit 1
fi

statuses="$out/statuses.txt"
: >"$statuses"
# part NAME SHARE COMMAND...: run it for at most SHARE hundredths of the minutes, and note how it ended. Interrupted, the
# suite keeps what it has measured.
part() {
    local name=$1 share=$2 start=$SECONDS status
    shift 2
    case ",$only," in *",$name,"*) ;; *) return 0 ;; esac
    echo "== $name"
    timeout --signal=INT --kill-after=10 "$(awk "BEGIN { print $minutes * 60 * $share / 100 }")" "$@"
    status=$?
    echo "$name $status $((SECONDS - start))" >>"$statuses"
}

doctor() { "$python" -m fastpref doctor --json >"$out/doctor.json"; }
tests() { "$python" -m pytest tests/gpu tests/triton/launched -q -p no:cacheprovider --durations=5 2>&1 | tail -n 200 | tee "$out/tests.txt"; }
check() { "$python" -m fastpref check --device "$device" --json >"$out/check.json"; }
bench() { "$python" -m fastpref bench logprobs linear losses --device "$device" --shapes "$shapes" --out "$out"; }
sanitizer() {
    local tool status=0
    command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not here" | tee "$out/sanitizer.txt"; return 77; }
    : >"$out/sanitizer.txt"
    for tool in memcheck racecheck initcheck; do
        echo "-- $tool" >>"$out/sanitizer.txt"
        # Memory that torch hands out again is none that a tool can watch.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$python" benchmarks/smallest.py 2>&1 | tail -n 60 >>"$out/sanitizer.txt" || status=$?
    done
    return $status
}
export -f doctor tests check bench sanitizer
export python out device shapes

part doctor 8 bash -c 'set -o pipefail; doctor'
part tests 32 bash -c 'set -o pipefail; tests'
part check 12 bash -c 'set -o pipefail; check'
part bench 30 bash -c 'set -o pipefail; bench'
part sanitizer 15 bash -c 'set -o pipefail; sanitizer'
"$python" -m benchmarks.report.summary "$out"
