"""What the picture of each part of `cjepa benchmark` shows."""

from trainers.cost_figure import Bars, Shares
from trainers.data_cost import WHAT as CROPPED
from trainers.loading_cost import WHAT as LOADED
from trainers.memory_cost import WHAT as REMEMBERED
from trainers.step_cost import RACERS

_MIB = 2**20


def _scaled(quartiles: dict[str, float], factor: float) -> dict[str, float]:
    return {place: factor * quartiles[place] for place in ("low", "median", "high")}


def step_panels(found: dict) -> list[Bars | Shares]:
    """Seconds, speed, MFU and memory of all steps, and the parts of ours."""
    where = f"{found['size']}, {found['batch_size']} images, {found['precision']}, {found['device']}"
    return [
        Bars(
            f"a training step: {where}",
            "ms a step",
            {title: _scaled(found["seconds"][name], 1e3) for name, title in RACERS.items()},
        ),
        Bars(
            "how many times as fast as the authors', round by round",
            "times",
            {title: found["factor"].get(name, 1.0) for name, title in RACERS.items()},
        ),
        Bars(
            f"the authors' operations over the seconds, in shares of {found['matmul_rate'] / 1e9:,.0f} GFLOP/s",
            "MFU, %",
            {title: _scaled(found["mfu"][name], 100) for name, title in RACERS.items()},
        ),
        Bars(
            "memory of a step beside the weights",
            "MiB a mask set",
            {title: found["memory"][name] / found["batch_size"] / _MIB for name, title in RACERS.items()},
        ),
        Shares("parts of ours", found["parts"]),
    ]


def mask_panels(found: list[dict]) -> list[Bars]:
    """Microseconds an image of each grid, ours and the loop's."""
    return [
        Bars(f"masks, grid {row['grid']}, {row['batch_size']} images: {row['factor']:.0f} times faster",
             "us an image", {"loop over images": row["loop"], "ours": row})
        for row in found
    ]  # fmt: skip


def data_panels(found: dict) -> list[Bars]:
    """Crops a second, and how many times as many as the authors'."""
    makers = f"workers: {found['workers']}" if found["workers"] else "one thread"
    factors = {CROPPED[name]: factor for name, factor in found["factor"].items()}
    return [
        Bars(f"crops of 224 pixels, {makers}", "images/s", {title: found[name] for name, title in CROPPED.items()}),
        Bars("speed over the authors'", "times", factors),
    ]


def level_panels(found: list[dict]) -> list[Bars]:
    """Milliseconds and memory of the stack's lowest levels."""
    titles = {row["levels"]: f"{row['levels']} level" + ("s" if row["levels"] > 1 else "") for row in found}
    return [
        Bars("a training step of the lowest levels", "ms", {titles[row["levels"]]: row for row in found}),
        Bars("activations of a step", "MiB", {titles[row["levels"]]: row["activations"] for row in found}),
    ]


def feature_panels(found: dict) -> list[Bars]:
    """Seconds of forward passes and of all of `cjepa features`."""
    values = {"forward passes alone": found["forward"], "cjepa features": found["features"]}
    return [Bars(f"features of {found['num_images']} images, {found['device']}", "seconds", values)]


def training_panels(found: dict) -> list[Bars]:
    """A step bare and of the trainer, and a checkpoint."""
    steps = {"bare": _scaled(found["bare"], 1e3), "of the trainer": _scaled(found["trainer"], 1e3)}
    checkpoint = {"all of it": found["save"], "training waits": found["stall"], "its bytes alone": found["write"]}
    return [
        Bars(f"a training step, {found['batch_size']} images, {found['device']}", "ms", steps),
        Bars(f"a checkpoint of {found['bytes'] / 1e6:.1f} MB", "seconds", checkpoint),
    ]


def loading_panels(found: dict) -> list[Bars]:
    """Seconds and memory of loading an encoder."""
    units = {"seconds": "loading a published encoder", "megabytes": "growth of the process with a first image"}
    return [Bars(title, unit, {LOADED[name]: found[name][unit] for name in LOADED}) for unit, title in units.items()]


def memory_panels(found: dict) -> list[Bars]:
    """What a process takes at most, for each batch size."""
    where = f"{found['size']}, {found['precision']}, {found['device']}"
    return [
        Bars(
            f"memory of training steps of {number} images: {where}",
            "MiB at most",
            {title: _scaled(found[kind][str(number)]["peak"], 1 / _MIB) for kind, title in REMEMBERED.items()},
        )
        for number in found["batch_sizes"]
    ]


def scale_panels(found: dict) -> list[Bars]:
    """Of each growth the ratios of seconds and of operations."""
    return [
        Bars(name, "times", {"seconds": row["seconds"], "FLOPs": row["flops"]})
        for name, row in found["growths"].items()
    ]
