#!/usr/bin/env bash
# GRPO with 2 learners and 2 samplers on this machine, and the same run in one process: equal weights.
#
#     examples/cluster/two_and_two.sh [FOLDER]        # a new folder for both runs; 2 cores, about 3 minutes
set -euo pipefail
out=${1:-runs/two-and-two}
[ ! -e "$out" ] || { echo "$out exists already; give a new folder." >&2; exit 2; }
mkdir -p "$out"

# train.lanes is part of what is computed, so it is the same in both runs. The [cluster] settings are not.
run() {
  posttrain grpo --model abacus --tasks arithmetic --train.steps "${STEPS:-4}" --train.lanes 2 --train.threads 1 \
    --algo.prompts 8 --algo.group_size 8 --train.micro_batch_tokens 512 --rollout.max_tokens 48 --eval.problems 32 \
    --json "$@"
}
weights() { grep -o '"weights": "[0-9a-f]*"' "$1"; }

run --out "$out/one" > "$out/one.json"
run --out "$out/two-and-two" --cluster.learners 2 --cluster.samplers 2 > "$out/two-and-two.json"

posttrain cluster status "$out/two-and-two"
echo "one process:             $(weights "$out/one.json")"
echo "2 learners + 2 samplers: $(weights "$out/two-and-two.json")"
[ "$(weights "$out/one.json")" = "$(weights "$out/two-and-two.json")" ] || { echo "The weights differ." >&2; exit 1; }
echo "The weights are equal."
