#!/bin/sh
# All experiments that need a GPU, one after the other, with one seed after the other; each goes on where it was interrupted. Flags are
# laid on all runs.
#
#   sh scripts/experiments/gpu.sh --dataset my/cifar10
#
# `cjepa` must be found (`PATH=.venv/bin:$PATH`). 198 runs, 66 of a seed; their models take some 15 GB of disk, computed, not seen. Training
# takes 3.4 hours a seed if steps reach 30 % of an H200's rate of matrix products, as `--estimate` assumes, of which gpu_cifar10 has 2.6;
# loading and evaluation come on top. No hour was measured.
#
# A try on a CPU, which leaves the results alone (27 minutes on two cores beside other work, commit 6bb4a01635):
#
#   SEEDS=42 RUNS=runs/try RESULTS=runs/try sh scripts/experiments/gpu.sh --dataset my/cifar10 --max_steps 2 \
#     --num_train_images 64 --num_eval_images 64 --per_device_train_batch_size 8 --dataloader_num_workers 0
# One that fails does not keep the others from being run; the exit status is that of the last that failed. A stop (Ctrl-C, SIGTERM,
# SIGUSR1, --max_hours) ends all, with status 130, and the same command goes on.
status=0
for seed in ${SEEDS:-42 43 44}; do
  for name in gpu_cifar10 gpu_ablation gpu_sjea gpu_collapse; do
    cjepa experiment "$name" --seeds "$seed" --output "${RUNS:-runs/experiments}/$name" --results "${RESULTS:-docs/results}" "$@" ||
      status=$?
    [ "$status" -eq 130 ] && exit 130
  done
done
exit $status
