#!/usr/bin/env bash
# Correctness, waits, step times and memory on one GPU, in under 12 minutes:
#
#   scripts/gpu_tables.sh out/gpu                 # on a GPU
#   scripts/gpu_tables.sh out/gpu miniature       # the same programs on the CPU, to see that they work
#
# Every part has its own log and its own time limit, so that one that hangs costs only its own table.
set -uo pipefail
out=${1:-out/gpu} size=${2:-full}
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out"
code=0
part() { # name, seconds, command
  local name=$1 limit=$2 started=$SECONDS status=0
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>"$out/$name.err" || status=$?
  echo "== $name: exit code $status after $((SECONDS - started)) s"
  cat "$out/$name.log"
  if [ "$status" != 0 ]; then code=1; tail -n 5 "$out/$name.err"; fi
}
benchmark=("$python" "$here/scripts/benchmark.py" --peers none)
if [ "$size" = miniature ]; then
  small=(--device cpu --hidden_size 32 --tokens 64 --sequence_length 32 --vocab_size 64 --num_hidden_layers 1)
  short=(--rounds 1 --interval 1 --steps 1 --optim kfac muon)
  part check 300 "$python" -m hf_so2 device-check --device cpu --optim kfac --settings float32 --output_dir "$out/check"
  part float32 300 "${benchmark[@]}" "${small[@]}" "${short[@]}" --output_dir "$out/float32"
  part bf16 300 "${benchmark[@]}" "${small[@]}" "${short[@]}" --bf16 --output_dir "$out/bf16"
  exit $code
fi
common=(--device cuda --num_attention_heads 16 --num_hidden_layers 2 --vocab_size 4096 --tokens 16384)
common+=(--sequence_length 512 --rounds 1 --interval 10 --steps 10)
all=(kfac foof tkfac shampoo kl_shampoo soap muon ekfac)
medium=() # TF32 for the products of statistics and preconditioners
for name in "${all[@]}"; do medium+=("$name:curvature_matmul_precision=medium"); done
part check 120 "$python" -m hf_so2 device-check --output_dir "$out/check"
part float32 110 "${benchmark[@]}" "${common[@]}" --hidden_size 1024 --optim "${all[@]}" --output_dir "$out/float32"
part bf16 140 "${benchmark[@]}" "${common[@]}" --hidden_size 1024 --bf16 --optim kfac "${medium[@]}" --output_dir "$out/bf16"
deep=(--hidden_size 1024 --num_hidden_layers 24 --tokens 2048 --optim kfac foof muon tkfac)
part stacks 90 "${benchmark[@]}" "${common[@]}" "${deep[@]}" --output_dir "$out/stacks"
part no_stacks 120 "${benchmark[@]}" "${common[@]}" "${deep[@]}" --no_stacks --output_dir "$out/no_stacks"
part bf16_2048 100 "${benchmark[@]}" "${common[@]}" --hidden_size 2048 --bf16 \
  --optim "${medium[@]:0:2}" "${medium[@]:6:1}" --output_dir "$out/bf16_2048"
exit $code
