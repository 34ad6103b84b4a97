#!/usr/bin/env bash
# A ladder on a machine that is to be had for minutes at a time, and may be another one each time.
#
#   benchmarks/ladder_in_pieces.sh CARRIED WORK BACK SECONDS [options of `blackmamba reproduce`]
#
# CARRIED  comes along: text/*.jsonl.xz, tokenizer.json and, after the first time, finished.tar.gz
# WORK     the prepared text and the runs; if it is still there from the time before, runs that were
#          cut go on from their checkpoints, else they begin anew
# BACK     finished.tar.gz is written there: what tables and pictures need of all finished runs
# SECONDS  for everything: training is cut so much earlier that there is time to pack; 0: the text is
#          prepared and no more, for instance while the GPUs have other work
set -euo pipefail
carried=$(realpath -m "$1") work=$(realpath -m "$2") back=$(realpath -m "$3") whole=$4
shift 4
sources=$(realpath "$(dirname "$0")/../src")
export PYTHONPATH="$sources${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$work/reproduced" "$back"

python3 -m blackmamba data prepare --text "$carried/text" --tokenizer "$carried/tokenizer.json" \
  --validation-fraction 0.01 --workers 8 --out "$work/prepared"
if [ -e "$carried/finished.tar.gz" ]; then
  tar -xzf "$carried/finished.tar.gz" -C "$work/reproduced"
fi
echo "ready after $SECONDS s"
if [ "$whole" = 0 ]; then exit 0; fi

status=0
python3 -m blackmamba reproduce --prepared "$work/prepared" --out "$work/reproduced" \
  --seconds $((whole - SECONDS - 10)) "$@" || status=$?
echo "trained after $SECONDS s"

cd "$work/reproduced"
{
  find . -maxdepth 1 -type f
  for final in runs/*/final.json; do
    run=${final%/*}
    if [ -e "$final" ]; then printf '%s\n' "$final" "$run/metrics.jsonl" "$run/recipe.yaml"; fi
  done
} | tar -czf "$back/.finished" -T -
mv "$back/.finished" "$back/finished.tar.gz"
tar -tzf "$back/finished.tar.gz" | grep final.json || echo "no run is finished"
ls -l "$back/finished.tar.gz"
echo "packed after $SECONDS s"
exit $((status == 124 ? 0 : status))  # 124: time is up
