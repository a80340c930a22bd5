"""`cjepa pretrain` as a script, for launchers: accelerate launch scripts/pretrain.py RECIPE --any_field value"""

import sys

from trainers.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
