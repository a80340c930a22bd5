"""`cjepa finetune` as a script, for launchers: torchrun --nproc_per_node 2 scripts/finetune.py MODEL --key value"""

import sys

from trainers.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
