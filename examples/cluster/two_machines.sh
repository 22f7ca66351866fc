#!/usr/bin/env bash
# GRPO with 2 learners and 2 samplers on two "machines": a Ray cluster over two network namespaces of this one.
# The same commands, without `ip netns exec`, make a cluster of two real machines (docs/cluster.md).
#
#     sudo examples/cluster/two_machines.sh [FOLDER]  # a new folder for both runs; Linux, about 5 minutes
set -euo pipefail
out=${1:-runs/two-machines}
[ ! -e "$out" ] || { echo "$out exists already; give a new folder." >&2; exit 2; }
a=posttrain-a-$$ b=posttrain-b-$$
if ! ip netns add "$a" 2>/dev/null; then
  echo "This example makes network namespaces, which needs Linux, the program ip and root." >&2
  exit 2
fi
cleanup() {
  [ -z "${joined:-}" ] || kill "$joined" 2>/dev/null && wait "$joined" 2>/dev/null || true
  ip netns exec "$a" posttrain cluster down || true
  ip netns delete "$a"
  ip netns delete "$b" 2>/dev/null || true
}
trap cleanup EXIT
ip netns add "$b"
ip link add va$$ netns "$a" type veth peer name vb$$ netns "$b"
ip -n "$a" address add 10.77.0.1/24 dev va$$
ip -n "$b" address add 10.77.0.2/24 dev vb$$
for space in "$a:va$$" "$b:vb$$"; do
  ip -n "${space%:*}" link set lo up
  ip -n "${space%:*}" link set "${space#*:}" up
done
mkdir -p "$out"
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_TOKEN_PATH="$PWD/$out/token"
[ "${out#/}" = "$out" ] || RAY_AUTH_TOKEN_PATH="$out/token"

echo "== machine 1: the head"
ip netns exec "$a" posttrain cluster up --host 10.77.0.1 --cpus 2

echo "== machine 2 joins"
ip netns exec "$b" ray start --address=10.77.0.1:6379 --node-ip-address=10.77.0.2 --num-cpus=2 --block \
  > "$out/machine-2.log" 2>&1 &
joined=$!
until grep -q "Ray runtime started" "$out/machine-2.log"; do
  kill -0 "$joined" 2>/dev/null || { cat "$out/machine-2.log" >&2; exit 1; }
  sleep 0.2
done

run() {
  posttrain grpo --model abacus --tasks arithmetic --train.steps "${STEPS:-4}" --train.lanes 2 --train.threads 1 \
    --algo.prompts 8 --algo.group_size 8 --train.micro_batch_tokens 512 --rollout.max_tokens 48 --eval.problems 32 \
    --json "$@"
}
weights() { grep -o '"weights": "[0-9a-f]*"' "$1"; }
export -f run

echo "== 2 learners and 2 samplers on both machines"
STEPS=${STEPS:-4} ip netns exec "$a" bash -c 'run "$@"' run --out "$out/two-machines" --cluster.backend ray \
  --cluster.address 10.77.0.1:6379 --cluster.learners 2 --cluster.samplers 2 > "$out/two-machines.json"
posttrain cluster status "$out/two-machines"

echo "== one process"
run --out "$out/one" > "$out/one.json"
echo "one process:  $(weights "$out/one.json")"
echo "two machines: $(weights "$out/two-machines.json")"
[ "$(weights "$out/one.json")" = "$(weights "$out/two-machines.json")" ] || { echo "The weights differ." >&2; exit 1; }
echo "The weights are equal."
