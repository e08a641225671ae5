#!/usr/bin/env bash
# All that a GPU has to show, in one run on a machine with nothing but Python and torch, without a network:
#   bench/gpu.sh [--wheels FOLDER] [--out FOLDER] [--work FOLDER] [--total SECONDS] [--only STAGE,STAGE] [--rehearse]
# Stages: install shapes tests kernels decode decode7b image swap ahead peers report. Each has a time of its own, prints as it
# goes, leaves its JSON in --out (bench/results) cell by cell, and fails alone. --total bounds them together (700 s): what
# no longer fits is named, and the report is of what there is. Where one command may not run so long, run --only some
# and then the others, with the same --work and --out. --wheels installs a folder of wheels beside the machine's own packages and changes none of them.
# --rehearse runs all of it at tiny shapes on a CPU. Exit status 1 when a stage failed or did not fit.
set -uo pipefail
cd "$(dirname "$0")/.."

wheels="" out="bench/results" work="" total=700 only="" rehearse=0
while [ $# -gt 0 ]; do
  case "$1" in
    --wheels) wheels=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    --work) work=$2; shift 2 ;;
    --total) total=$2; shift 2 ;;
    --only) only=$2; shift 2 ;;
    --rehearse) rehearse=1; shift ;;
    *) sed -n '2,11p' "$0" >&2; exit 2 ;;
  esac
done
work=${work:-$(mktemp -d)}
mkdir -p "$out" "$work"
out=$(cd "$out" && pwd) work=$(cd "$work" && pwd)
export PYTHONPATH="$work/site:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python3}
lorikeet() { "$python" lorikeet.py "$@"; }
export -f lorikeet
export python out work

if [ "$rehearse" = 1 ]; then
  export small=tiny large=tiny size=smoke repeats=1 device=cpu adapters=64 slots=8 streams="1 8" kernel_rows=1,4 kernel_s=0.02 calls="--calls=4" peer_size=smoke
else
  export small=3b large=7b size=full repeats=2 device=cuda adapters=64 slots=64 streams="1 32 64" kernel_rows=1,4,16,32,64 kernel_s=0.1 calls="" peer_size=small
fi
flags="--serve=--device=$device --serve=--num-slots=$slots --serve=--max-rank=16 --serve=--max-running=96"
export flags="$flags --serve=--host-adapter-memory=12GiB"

# the peers' workers need room beside our server, which would take 0.9 of a GPU
share="" && [ "$rehearse" = 1 ] || share="--serve=--device-memory=0.4"
export share

report_s=20  # kept for the last stage, whatever the others took
[ -e "$work/began" ] || : > "$work/began"  # the report is of what is newer, whatever else lies in --out
began=$(date +%s) summary="$out/gpu-stages.jsonl" num_bad=0
[ -z "$only" ] && : > "$summary"  # stages that are run by themselves are added to those before
began_at=$(wc -l < "$summary" 2> /dev/null || echo 0)

# stage NAME SECONDS COMMAND: within its time and what is left of the whole
stage() {
  local name=$1 most=$2 command=$3 left begin rc
  [ -n "$only" ] && case ",$only," in *",$name,"*) ;; *) return 0 ;; esac
  left=$((total - ($(date +%s) - began)))
  [ "$name" = report ] || left=$((left - report_s))
  if [ "$left" -lt 15 ]; then
    echo "== $name: no time left"
    echo "{\"stage\": \"$name\", \"status\": \"no time left\"}" >> "$summary"
    num_bad=$((num_bad + 1))
    return 0
  fi
  [ "$most" -gt "$left" ] && most=$left
  echo "== $name: at most $most s, $left s left of the whole"
  begin=$(date +%s)
  # the trap: bash would leave at once and the next stage would meet a server that is still on the device
  timeout -k 10 "$most" bash -c "trap : TERM; set -eo pipefail; $command"
  rc=$?
  echo "== $name: status $rc after $(($(date +%s) - begin)) s"
  echo "{\"stage\": \"$name\", \"status\": $rc, \"seconds\": $(($(date +%s) - begin)), \"limit_s\": $most}" >> "$summary"
  [ "$rc" = 0 ] || num_bad=$((num_bad + 1))
  return 0
}

if [ -n "$wheels" ]; then
  export wheels
  # where pip is missing or refuses one, all are unpacked as they are
  stage install 60 '"$python" -m pip install --quiet --no-index --no-deps --target "$work/site" "$wheels"/*.whl ||
    for wheel in "$wheels"/*.whl; do "$python" -m zipfile -e "$wheel" "$work/site"; done'
fi
[ "$rehearse" = 1 ] || { command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv; }

# both at once: they need cores, not the GPU; storm and distinct-64 want 64 adapters
make_base='[ -f "$work/$1/config.json" ] || { rm -rf "$work/$1"; lorikeet bench shapes "$2" "$work/$1"; }
  lorikeet bench adapters "$work/$1" "$work/$1-adapters" --count "$adapters" --ranks 16'
stage shapes 150 "make() { $make_base; }; make large $large > $work/large.log 2>&1 & make small $small; wait; tail -n 2 $work/large.log"
# a file each: what breaks a device context or does not end takes no other with it, and INT lets pytest say what it found
export test_s=60
stage tests 170 'bad=0; for file in $(grep -rl --include="test_*.py" "mark.gpu" tests); do
  timeout -s INT -k 10 "$test_s" "$python" -m pytest -m gpu -v -ra --tb=short --durations=5 \
    --junitxml="$out/gpu-tests-$(basename "$file" .py).xml" "$file" || bad=1; done; [ "$bad" = 0 ]'
stage kernels 70 'lorikeet bench kernels --shape "$work/small" --rows "$kernel_rows" --budget-s "$kernel_s" --out "$out"'
cells='names=""; for n in $streams; do names="$names base-$n closed-$n"; done
  lorikeet bench run $names --base "$work/$1" --adapter-root "$work/$1-adapters" --size "$size" --repeats "$repeats" $calls $flags --out "$out" --label "lorikeet-$1"'
stage decode 140 "cells() { $cells; }; cells small"
stage decode7b 110 "cells() { $cells; }; cells large"
one='lorikeet bench run $names --base "$work/small" --adapter-root "$work/small-adapters" --size "$size" --repeats "$repeats" $calls $flags --out "$out"'
stage image 60 "names='one-picture pictures'; $one"
stage swap 60 "names='storm working-set distinct-64'; [ $rehearse = 0 ] || names=storm; $one"
# beside the decode stage's: what it is worth that the next step is started first
stage ahead 60 "names='closed-1 closed-32'; [ $rehearse = 0 ] || names=closed-1; $one --serve=--step-ahead=off --label lorikeet-not-ahead"
stage peers 150 'lorikeet bench peers closed-8 --base "$work/small" --adapter-root "$work/small-adapters" --kinds adapter-names,set-adapter --size "$peer_size" --repeats 1 --calls 8 $flags $share --out "$out"'
stage report "$report_s" 'lorikeet bench report $(find "$out" -maxdepth 1 -name "*.json" -newer "$work/began") --markdown > "$out/gpu-report.md"; tail -n 40 "$out/gpu-report.md"'

echo "== done in $(($(date +%s) - began)) s; $num_bad stages failed or did not fit"
tail -n +$((began_at + 1)) "$summary"
[ "$num_bad" = 0 ]
