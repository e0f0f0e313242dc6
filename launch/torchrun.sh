#!/usr/bin/env bash
#
# Train a recipe by torchrun, without a scheduler: on this machine, or on several by hand. (`gigatrain launch` does all of this by itself.)
#
#   launch/torchrun.sh quickstart                                    every GPU of this machine; without one, one process
#   NPROC=4 launch/torchrun.sh my.toml --run runs/mine --continue    four processes; goes on where a checkpoint is
#
# On several machines, once on each, at about the same time, with a run folder that all of them see:
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node1 launch/torchrun.sh my.toml --run /shared/runs/mine     on node1
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node1 launch/torchrun.sh my.toml --run /shared/runs/mine     on node2
#
# The arguments are those of `gigatrain train`. Further variables: MASTER_PORT (29500, free on MASTER_ADDR), PYTHON (python3, the one that has gigatrain).
# Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint; the same command with --continue goes on.

set -euo pipefail

python=${PYTHON:-python3}
nodes=${NNODES:-1} node=${NODE_RANK:-0} address=${MASTER_ADDR:-127.0.0.1} port=${MASTER_PORT:-29500}

refuse() { echo "torchrun.sh: $*" >&2; exit 7; }

[ "$#" -ge 1 ] || refuse "which recipe? For instance: launch/torchrun.sh quickstart"
for number in "$nodes" "$node" "$port" "${NPROC:-1}"; do
    [[ $number =~ ^[0-9]+$ ]] || refuse "'$number' is no count; NNODES, NODE_RANK, MASTER_PORT and NPROC are"
done
[ "$node" -lt "$nodes" ] || refuse "NODE_RANK is $node, and of NNODES=$nodes machines the last is $((nodes - 1))"
[ "$nodes" = 1 ] || [ -n "${MASTER_ADDR:-}" ] || refuse "NNODES is $nodes: set MASTER_ADDR to the first machine's address, the same on all"

# One process a GPU that may be seen. Where there is none, one; a CPU is shared by more with NPROC.
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    seen=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -cE '^[^-]' || true)
else
    seen=$({ nvidia-smi --list-gpus || rocm-smi --showuniqueid --csv; } 2>/dev/null | grep -cE '^(GPU |card)' || true)
fi
ranks=${NPROC:-$seen}
[ "$ranks" -gt 0 ] || ranks=1

# Every rank needs the same run folder, and would else name one by its own clock.
case " $* " in
    *" --run "* | *" --run="*) ;;
    *)
        [ "$nodes" = 1 ] || refuse "several machines need one run folder that all of them see; name it with --run"
        name=${1##*/}
        set -- "$@" --run "runs/${name%.toml}-$(date +%Y%m%d-%H%M%S)"
        ;;
esac

# No restarts by torchrun: with gloo, ranks that come back within a job hang, and `--continue` starts from the newest checkpoint anyway.
# gigatrain's agent is torchrun with one change: a signal is passed on to the ranks, which save and leave, and is waited for.
exec "$python" -m gigatrain.launching.agent \
    --nnodes="$nodes" --node-rank="$node" --nproc-per-node="$ranks" \
    --master-addr="$address" --master-port="$port" --max-restarts=0 --shutdown-timeout=20 \
    -m -- gigatrain train "$@"
