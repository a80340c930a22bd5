#!/bin/sh
# All experiments that need a GPU, one after the other; each goes on where it was interrupted. Flags are laid on all runs.
#
#   sh scripts/experiments/gpu.sh --dataset my/cifar10
#
# `cjepa` must be found (`PATH=.venv/bin:$PATH`). 192 runs; their models take some 15 GB of disk, computed, not seen. Hours are not known yet:
# gpu_cifar10 is meant for half an hour of one H200 a run.
#
# A try on a CPU, which leaves the results alone (27 minutes on two cores beside other work, commit 6bb4a01635):
#
#   RUNS=runs/try RESULTS=runs/try sh scripts/experiments/gpu.sh --dataset my/cifar10 --seeds 42 --max_steps 2 \
#     --num_train_images 64 --num_eval_images 64 --per_device_train_batch_size 8 --dataloader_num_workers 0
# One that fails does not keep the others from being run; the exit status is that of the last that failed. A stop (Ctrl-C, SIGTERM,
# SIGUSR1, --max_hours) ends all, with status 130, and the same command goes on.
status=0
for name in gpu_cifar10 gpu_ablation gpu_sjea gpu_collapse; do
  cjepa experiment "$name" --output "${RUNS:-runs/experiments}/$name" --results "${RESULTS:-docs/results}" "$@" ||
    status=$?
  [ "$status" -eq 130 ] && break
done
exit $status
