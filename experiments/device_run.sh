#!/bin/bash
# device_run.sh SECONDS [more flags of width_drift.py]: all within SECONDS; results and log in $OUT.
started=$(date +%s)
total=$1; shift
here="$(cd "$(dirname "$0")" && pwd)"
OUT="${OUT:-/tmp/out}"; mkdir -p "$OUT"
exec 3>&1 >>"$OUT/log.txt" 2>&1 </dev/null
cores=$(nproc)
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
export CUDA_MODULE_LOADING=LAZY
DEVICE="${DEVICE:-cuda}"
echo "$cores cores"; timeout 20 nvidia-smi --query-gpu=name,memory.total,compute_mode --format=csv,noheader
if [ "$DEVICE" = cuda ] && command -v nvidia-cuda-mps-control >/dev/null && [ -z "$NO_MPS" ]; then
  export CUDA_MPS_PIPE_DIRECTORY=/tmp/mps_pipe CUDA_MPS_LOG_DIRECTORY=/tmp/mps_log
  mkdir -p $CUDA_MPS_PIPE_DIRECTORY $CUDA_MPS_LOG_DIRECTORY
  if timeout 20 nvidia-cuda-mps-control -d >/dev/null 2>&1 3>&- && timeout 40 python3 -c 'import torch;x=torch.randn(512,512,device="cuda");print("with MPS:",float((x@x).norm())>0)'; then
    echo "MPS is on"
  else
    echo "MPS failed"; tail -5 /tmp/mps_log/*.log
    (echo quit | timeout 10 nvidia-cuda-mps-control) 3>&-
    unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
  fi
else
  echo "no MPS"
fi
timeout 600 nvidia-smi --query-gpu=utilization.gpu,memory.used --format=csv,noheader -l 5 >"$OUT/use.csv" 2>/dev/null 3>&- &
watcher=$!
go() {
  left=$(( total - ($(date +%s) - started) - 4 ))
  echo "$(( $(date +%s) - started )) s have passed, $left s left"
  timeout -k 2 $(( left + 2 )) python3 "$here/width_drift.py" --data "$here/data" --output "$OUT" --device "$DEVICE" --workers "${WORKERS:-14}" --seconds "$left" "$@" 3>&-
}
go "$@"
if [ $? = 3 ] && [ -n "$CUDA_MPS_PIPE_DIRECTORY" ]; then
  tail -5 /tmp/mps_log/*.log
  (echo quit | timeout 5 nvidia-cuda-mps-control) 3>&-
  unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
  go "$@"
fi
kill $watcher 2>/dev/null
[ -n "$CUDA_MPS_PIPE_DIRECTORY" ] && (echo quit | timeout 5 nvidia-cuda-mps-control) 3>&-
echo "runs: $(wc -l <"$OUT/results.jsonl"), after $(( $(date +%s) - started )) s"
head -12 "$OUT/log.txt" >&3; tail -60 "$OUT/log.txt" >&3
exit 0
