"""The small runs by which the doctor is calibrated: healthy ones, and ones made to collapse."""

from dataclasses import dataclass

from trainers.recipes import Recipe, read_recipe

SHARED = {
    "num_train_images": 4000, "num_eval_images": 2000, "num_probe_images": 2000, "logging_steps": 20,
    "dataloader_num_workers": 0, "precision": "float32", "use_cpu": True, "disable_tqdm": True,
    "report_to": "none", "save_strategy": "no",
}  # fmt: skip
CJEPA = {
    "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 512,
    "predictor_hidden_size": 64, "predictor_num_hidden_layers": 2, "predictor_num_attention_heads": 2,
    "max_steps": 400,
}  # fmt: skip
STACK = {"upper_levels": [{"num_hidden_layers": 2, "stop_gradient": True}], "min_context_patches": 8}


def resnet_level(hidden_sizes=(16, 32, 64, 128), **changes) -> dict:
    """A level of S-JEA with a narrow ResNet."""
    backbone = {
        "model_type": "resnet", "embedding_size": hidden_sizes[0], "hidden_sizes": list(hidden_sizes),
        "depths": [1] * len(hidden_sizes), "layer_type": "basic",
    }  # fmt: skip
    return {"backbone": backbone, "stem": "small", "expander_sizes": [256] * 3} | changes


def sjea(*levels: dict, **changes) -> dict:
    """The keys of a small run of S-JEA."""
    return {"levels": list(levels) or [resnet_level()], "per_device_train_batch_size": 64, "max_steps": 300} | changes


@dataclass(frozen=True)
class Trial:
    """
    A run of the calibration.

    Args:
        recipe (`str`): The recipe it starts from.
        changes (`dict`): The keys that differ.
    """

    recipe: str
    changes: dict


def trials() -> dict[str, Trial]:
    """All runs by their names, those meant to be healthy first."""
    target_follows = {"ema_momentum": 0.0, "final_ema_momentum": 0.0}
    no_terms = {"regularizer_weight": 0.0}
    rate_0 = {"start_learning_rate": 1.0e-7, "learning_rate": 1.0e-7, "final_learning_rate": 0.0}
    shallow, on_map = (16, 32, 64), {"hidden_sizes": (96,), "input": "map"}
    unheld = {"variance_weight": 0.0}

    def cjepa(recipe: str = "cjepa_cifar10", **changes) -> Trial:
        return Trial(recipe, CJEPA | changes)

    def two_views(*levels: dict, **changes) -> Trial:
        return Trial("sjea_cifar10", sjea(*levels, **changes))

    return {
        "cjepa": cjepa(),
        "cjepa_wide": cjepa(hidden_size=256, num_hidden_layers=2, max_steps=300),
        "cjepa_batch_64": cjepa(per_device_train_batch_size=64, max_steps=250),
        "cjepa_weight_falls": cjepa(final_regularizer_weight=5.0e-4),
        "cjepa_pair": cjepa(regularizer="pair", regularizer_weight=0.02),
        "cjepa_scenes": cjepa("cjepa_scenes"),
        "cjepa_stack": cjepa(**STACK),
        "vicreg": two_views(),
        "vicreg_shallow": two_views(resnet_level(shallow)),
        "vicreg_batch_128": two_views(per_device_train_batch_size=128, max_steps=200),
        "vicreg_scenes": two_views(dataset="scenes"),
        "sjea": two_views(resnet_level(shallow), resnet_level(**on_map)),
        "sjea_folded": two_views(resnet_level(), resnet_level((32, 64), stop_gradient=True)),
        # made to collapse, to diverge or to learn nothing
        "ema_0": cjepa(**target_follows, **no_terms),
        "ema_0_wide": cjepa(**target_follows, **no_terms, hidden_size=192),
        "ema_0_scenes": cjepa("cjepa_scenes", **target_follows, **no_terms, final_regularizer_weight=0.0),
        "ema_half": cjepa(ema_momentum=0.5, **no_terms),
        "stack_ema_0": cjepa(**STACK, **target_follows, **no_terms),
        "no_terms": cjepa(**no_terms),
        "variance_0": cjepa(**target_follows, **unheld),
        "rate_x30": cjepa(learning_rate=1.5e-2, max_grad_norm=0.0),
        "target_frozen": cjepa(ema_momentum=1.0),
        "rate_0": cjepa(**rate_0),
        "vicreg_variance_0": two_views(resnet_level(**unheld)),
        "vicreg_covariance_0": two_views(resnet_level(covariance_weight=0.0)),
        "vicreg_invariance_alone": two_views(resnet_level(**unheld, covariance_weight=0.0)),
        "vicreg_rate_x30": two_views(learning_rate=9.0e-2),
        "vicreg_rate_0": two_views(**rate_0),
        "sjea_variance_0": two_views(resnet_level(shallow, **unheld), resnet_level(**on_map, **unheld)),
    }


def trial_recipe(name: str, seed: int, dataset: str | None, output_dir: str) -> Recipe:
    """
    The recipe of a run.

    Args:
        name (`str`): Of [`trials`].
        seed (`int`): Of the run.
        dataset (`str`, *optional*): A copy of CIFAR-10 for the runs on it; that of the Hub when not given.
        output_dir (`str`): Its folder.

    Returns:
        [`Recipe`].
    """
    trial = trials()[name]
    changes = SHARED | trial.changes | {"seed": seed, "output_dir": output_dir}
    if dataset and trial.recipe != "cjepa_scenes":
        changes.setdefault("dataset", dataset)
    return read_recipe(trial.recipe, changes)
