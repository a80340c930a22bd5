"""An experiment small enough for tests, and what would be found of a run."""

import yaml
from tiny import FLAGS

from trainers.experiment_runs import digest_of, settings_text
from trainers.probes import accuracy_interval

SETTINGS = dict(zip((flag[2:] for flag in FLAGS[:-1:2]), map(yaml.safe_load, FLAGS[1:-1:2]), strict=True))
SETTINGS |= {"use_cpu": True, "disable_tqdm": True, "max_steps": 4, "final_regularizer_weight": 0.0}
PLAN_ONLY_CJEPA = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "final_regularizer_weight",
    "predictor_hidden_size", "predictor_num_hidden_layers", "predictor_num_attention_heads",
)  # fmt: skip
PLAN = {
    "title": "With and without", "dataset": "scenes-64", "recipe": "cjepa_scenes", "seeds": [1, 2],
    "methods": {"c-jepa": {}, "i-jepa": {"regularizer_weight": 0.0}}, "settings": SETTINGS,
}  # fmt: skip


def written(folder, **changes):
    path = folder / "small.yaml"
    path.write_text(yaml.dump(PLAN | changes))
    return str(path)


def of_400(percent):
    """The interval of an accuracy on 400 images."""
    return list(accuracy_interval(round(4 * percent), 400))


def measured(percent):
    """What an encoder of so good a kNN would be found to have: of each metric another figure."""
    return {
        "knn": percent, "knn_interval": of_400(percent),
        "linear": percent + 10, "linear_interval": of_400(percent + 10),
        "rankme": percent / 4, "lidar": percent / 8, "feature_std": percent / 64,
    }  # fmt: skip


def a_run(method, seed, knn, *earlier, begin=10.0, **changes):
    """What was found of a run of 100 images between evaluations."""
    points = [
        {"step": 10 * at, "images_seen": 100 * at, "rows": [{"encoder": ""} | measured(value)]}
        for at, value in enumerate((*earlier, knn), start=1)
    ]
    return {
        "method": method, "seed": seed, "swept": {}, "images": {"fingerprint": "a"}, "points": points,
        "baselines": [{"encoder": ""} | measured(begin) | {"weights": f"{begin}, {seed}"}],
        "training": {"images_seen": points[-1]["images_seen"], "seconds": 60.0 * seed, "steps": points[-1]["step"],
                     "skipped_steps": 0},
        "machine": {"processor": "P", "threads": 2},
        "software": {"commit": f"c{seed}"}, "evaluated": {"commit": "e", "precision": "float32"},
    } | changes  # fmt: skip


def digests(experiment):
    return {(run.method, run.seed): digest_of(run, settings_text(experiment, run)) for run in experiment.runs()}
