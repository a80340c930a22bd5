"""Trains a tiny model for a few steps and saves its weights; started by tests, alone or by torchrun.

python tests/training_worker.py OUTPUT '{"name": {"max_steps": 4, ...}, ...}'; "resume": true goes on from the last
checkpoint in OUTPUT/name.
"""

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from safetensors.torch import save_file  # noqa: E402
from tiny import SIZES  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from transformers.trainer_utils import set_seed  # noqa: E402

from trainers.objectives import OBJECTIVES  # noqa: E402
from trainers.processes import end_processes  # noqa: E402
from trainers.sources import load_sources  # noqa: E402
from trainers.stream_sources import load_stream  # noqa: E402
from trainers.trainer import JepaTrainer  # noqa: E402

MODEL = SIZES | {"predictor_num_hidden_layers": 1, "initializer_range": 0.02}
TRAINING = {
    "precision": "float32",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "optim": "adamw_torch",
}


def build_trainer(
    output: str, training: dict, model: dict | None = None, data: dict | None = None, num_images: int = 48
) -> JepaTrainer:
    """A trainer of C-JEPA, or of S-JEA where the model has `levels`."""
    fields = dict(model or {})
    objective = OBJECTIVES["sjea" if "levels" in fields else "cjepa"]
    arguments = objective.training_class(output_dir=output, **{**TRAINING, **training})
    set_seed(arguments.seed)
    data = dict(data or {})
    if not data.get("streaming"):
        data = {"num_train_images": num_images, "num_eval_images": 1} | data
    data = objective.data_class(**data)
    source = load_stream(data).shards if data.streaming else load_sources(data, image_size=32, progress=False)[0]
    config = objective.config_class(**(fields if "levels" in fields else MODEL | fields))
    return objective.build_trainer(objective.model_class(config), arguments, data, source)


def train(output: str, training: dict, resume: bool = False) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Trains from the start or from the last checkpoint; returns the final weights and the log."""
    training = dict(training)
    others = {name: training.pop(name) for name in ("model", "data", "num_images") if name in training}
    trainer = build_trainer(output, training, **others)
    trainer.add_callback(SampleIds(trainer))
    trainer.train(resume_from_checkpoint=resume)
    weights = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in trainer.model.state_dict().items()
    }
    return weights, trainer.state.log_history


class SampleIds(TrainerCallback):
    """Writes which images this process has read, step by step, into `seen-RANK.jsonl`."""

    def __init__(self, trainer: JepaTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        with Path(args.output_dir, f"seen-{args.process_index}.jsonl").open("a") as file:
            file.write(json.dumps([state.global_step, self.trainer.sample_ids(state.global_step - 1)]) + "\n")


def seen(folder: str | Path, last_step: int | None = None) -> list:
    """
    The images that all processes have read up to a step, in the order of their positions: an index, or shard and row.
    """
    parts = [
        {step: ids for step, ids in map(json.loads, path.read_text().splitlines()) if step <= (last_step or step)}
        for path in sorted(Path(folder).glob("seen-*.jsonl"))
    ]
    dealt = [
        sample_id
        for step in parts[0]
        for ids in zip(*(part[step] for part in parts), strict=True)
        for sample_id in ids
    ]
    return [sample_id.get("index", (sample_id.get("shard"), sample_id.get("offset"))) for sample_id in dealt]


def main(output: str, runs: str):
    """Trains each of several runs as one of the processes that torchrun started."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    for name, training in json.loads(runs).items():
        resume = training.pop("resume", False)
        weights, log = train(f"{output}/{name}", training, resume)
        assert torch.distributed.get_world_size() == int(os.environ["WORLD_SIZE"])
        save_file(weights, f"{output}/{name}-{rank}.safetensors")
        Path(output, f"{name}-{rank}.json").write_text(json.dumps(log))


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_processes()
