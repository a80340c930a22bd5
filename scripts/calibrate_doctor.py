"""Trains small runs, ill and healthy, and checks the doctor's verdicts on them.

python scripts/calibrate_doctor.py --dataset CIFAR10 --seeds 1 2 --processes 2
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainers.doctor_calibration import calibrate, save_trial  # noqa: E402
from trainers.doctor_trials import trials  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", help="a copy of CIFAR-10: parquet files or a folder (default: that of the Hub)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="of each run")
    parser.add_argument(
        "--names", nargs="+", default=list(trials()), choices=list(trials()), help="runs (default: all)"
    )
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, a thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs/doctor"), help="where runs leave their figures")
    parser.add_argument("--output", type=Path, default=Path("runs/doctor_calibration.json"), help="all of them")
    parser.add_argument("--trial", nargs=2, metavar=("NAME", "SEED"), help="one run alone")
    given = parser.parse_args()
    if given.trial:
        save_trial(given.trial[0], int(given.trial[1]), given.dataset, given.folder)
    else:
        print(
            calibrate(__file__, given.dataset, given.seeds, given.names, given.folder, given.output, given.processes)
        )


if __name__ == "__main__":
    main()
