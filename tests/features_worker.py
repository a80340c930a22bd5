"""Writes features of a saved model; started by tests, alone or by torchrun.

python tests/features_worker.py MODEL DATASET OUTPUT '{"name": {"shard_size": 4, ...}, ...}' NUM_PROCESSES [DELAY]
"""

import json
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from torch.nn.modules.module import register_module_forward_hook

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modeling_cjepa import CJepaModel  # noqa: E402
from trainers.feature_encoder import FeatureArguments  # noqa: E402
from trainers.features import write_features  # noqa: E402
from trainers.processes import end_processes  # noqa: E402
from trainers.sources import DataArguments  # noqa: E402


def main(model: str, dataset: str, output: str, runs: str, num_processes: str, delay: str = "0"):
    """Embeds, each forward pass delayed by so many seconds, so that a test can kill it in the middle."""
    torch.set_num_threads(1)
    pause = {CJepaModel: float(delay)}
    register_module_forward_hook(lambda module, *_: time.sleep(pause.get(type(module), 0)))
    for name, settings in json.loads(runs).items():
        write_features(model, DataArguments(dataset=dataset), f"{output}/{name}", FeatureArguments(**settings))
    state = PartialState()
    assert state.num_processes == int(num_processes)
    print(f"process {state.process_index} of {state.num_processes}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_processes()
