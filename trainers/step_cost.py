"""What a training step of C-JEPA takes beside the authors', on the same batches and masks, and where the time goes."""

import statistics
import time

import torch

from modeling_cjepa import CJepaConfig, CJepaForPreTraining
from trainers.benchmark import decay_groups, quartiles, step_rows
from trainers.errors import InputError
from trainers.flops import matmul_rate, model_flops
from trainers.reference_step import ReferenceStep
from trainers.reports import markdown_table
from trainers.training_args import computes_in_bf16


def _vit(width, layers, heads, predictor_width, predictor_layers, image_size=224, patch_size=16) -> dict:
    return {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": 4 * width, "predictor_hidden_size": predictor_width,
        "predictor_num_hidden_layers": predictor_layers, "predictor_num_attention_heads": heads,
        "image_size": image_size, "patch_size": patch_size,
    }  # fmt: skip


# the authors' sizes, and one for images of CIFAR-10
SIZES = {
    "cifar": _vit(192, 6, 3, 96, 3, image_size=32, patch_size=4),
    "vit_t16": _vit(192, 12, 3, 192, 6),
    "vit_s16": _vit(384, 12, 6, 384, 6),
    "vit_b16": _vit(768, 12, 12, 384, 6),
    "vit_l16": _vit(1024, 24, 16, 384, 12),
    "vit_h14": _vit(1280, 32, 16, 384, 12, patch_size=14),
}
PRECISIONS = ("float32", "bf16")
RACERS = {"reference": "the authors', re-stated", "ours": "ours, with its regulariser"}
# the largest difference of the two losses, without our regulariser, that leaves them the same function
_MOST_APART = {"float32": 1e-4, "bf16": 1e-2}


def benchmark_step(
    size: str = "cifar", batch_size: int = 64, num_rounds: int = 9, precision: str | None = None
) -> dict:
    """
    Times whole steps of ours, C-JEPA's with its regulariser, and of [`ReferenceStep`], I-JEPA's without.

    Args:
        size (`str`): One of [`SIZES`].
        batch_size (`int`): Images of a step.
        num_rounds (`int`): Timed steps of each, after one that is not counted.
        precision (`"float32"` or `"bf16"`, *optional*): Of both; what the device multiplies faster when not given.

    Returns:
        `dict`: `size`, `batch_size`, `device`, `threads`, `precision`; of `reference`, `ours` and `factor` (the
        reference's seconds over ours, round by round) `median`, `low` and `high` (quartiles); `parts`, the share of
        our step of each of its parts; `difference` of the two losses where ours leaves the regulariser out;
        `flops_per_image` of [`~flops.model_flops`], the rounds' mean; `matmul_rate` of the device in FLOP/s; `mfu`,
        of `reference` and `ours` the quartiles of the share of that rate at which they do the former, which are
        the same for both: a step that saves some of that work has a higher one.

    Raises:
        InputError: There is no such size or precision, too little to measure with, or the losses differ.
    """
    if size not in SIZES:
        raise InputError(f"--size {size!r} is not known; choose {', '.join(SIZES)}.")
    if batch_size < 2 or num_rounds < 2:
        raise InputError(f"--batch_size {batch_size} and --rounds {num_rounds} must be 2 or more.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = chosen_precision(precision, device)
    config = CJepaConfig(**SIZES[size], layer_norm_eps=1e-6)
    model = CJepaForPreTraining._from_config(config, attn_implementation="sdpa").to(device).train()
    race = _Race(model, batch_size, precision)
    difference = race.difference()
    if difference > _MOST_APART[precision]:
        raise InputError(f"The losses of ours and of the reference differ by {difference:.1e}: it is no comparison.")
    rates = [matmul_rate(device, precision)]
    rounds = [race.round() for _ in range(num_rounds + 1)][1:]
    flops, theirs, ours, parts = zip(*rounds, strict=True)
    rate = max(*rates, matmul_rate(device, precision))  # what else the machine does slows one or the other
    whole = sum(statistics.median(each[name] for each in parts) for name in parts[0])
    return {
        "size": size, "batch_size": batch_size, "device": device.type, "threads": torch.get_num_threads(),
        "precision": precision, "reference": quartiles(theirs), "ours": quartiles(ours),
        "factor": quartiles([their / our for their, our in zip(theirs, ours, strict=True)]),
        "parts": {name: statistics.median(each[name] for each in parts) / whole for name in parts[0]},
        "difference": difference, "flops_per_image": statistics.mean(flops), "matmul_rate": rate,
        "mfu": {
            name: quartiles([each * batch_size / step / rate for each, step in zip(flops, steps, strict=True)])
            for name, steps in (("reference", theirs), ("ours", ours))
        },
    }  # fmt: skip


def chosen_precision(asked: str | None, device: torch.device) -> str:
    """The precision that is asked for, or what a device multiplies faster; `InputError` if it is not known."""
    precision = asked or ("bf16" if computes_in_bf16(device) else "float32")
    if precision not in PRECISIONS:
        raise InputError(f"--precision {precision!r} is not known; choose {' or '.join(PRECISIONS)}.")
    return precision


class _Race:
    """A model, the reference with the same weights, and batches that both are given."""

    def __init__(self, model: CJepaForPreTraining, batch_size: int, precision: str):
        self.model, self.device, self.batch_size = model, model.device, batch_size
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")
        self.reference = ReferenceStep(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(decay_groups(trained, 0.05), lr=1e-4, fused=True)
        side = model.config.image_size
        self.images = torch.randn(batch_size, model.config.num_channels, side, side, device=self.device)
        self.draw_masks()

    def draw_masks(self):
        """The masks of the next steps of both."""
        self.masks = self.model.sample_masks(self.batch_size, device=self.device)

    def round(self) -> tuple[int, float, float, dict[str, float]]:
        """Floating-point operations an image of a step, seconds of the reference's and of ours, those of its parts."""
        context_ids, target_ids = self.masks
        flops = model_flops(self.model.config, context_ids.shape[1], *target_ids.shape[1:])
        return sum(flops.values()), self.reference_seconds(), self.our_seconds(), self.part_seconds()

    @torch.no_grad()
    def difference(self) -> float:
        """How far the two losses of one batch are apart, without our regulariser."""
        with self.autocast:
            ours = self.model(self.images, *self.masks, regularizer_weight=0.0).loss
            return (ours - self.reference.loss(self.images, *self.masks)).abs().item()

    def reference_seconds(self) -> float:
        """Seconds of a step of the reference."""
        watch = _Stopwatch(self.device)
        with self.autocast:
            loss = self.reference.loss(self.images, *self.masks)
        self.reference.finish(loss)
        return watch.seconds()

    def our_seconds(self) -> float:
        """Seconds of a step of ours."""
        watch = _Stopwatch(self.device)
        with self.autocast:
            loss = self.model(self.images, *self.masks).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.update_target_encoder(0.996)
        return watch.seconds()

    def part_seconds(self) -> dict[str, float]:
        """Seconds of the parts of a step of ours; `loss and signs` is what the others leave of the forward pass."""
        model, images, watch, found = self.model, self.images, _Stopwatch(self.device), {}
        self.draw_masks()
        found["masks"] = watch.seconds()
        context_ids, target_ids = self.masks
        with self.autocast:
            with torch.no_grad():
                model.cjepa.encode(images)
            found["target encoder"] = watch.seconds()
            context = model.context_encoder.encode(images, context_ids)[0].last_hidden_state
            found["context encoder"] = watch.seconds()
            model.predictor(context, context_ids, target_ids, model.config.grid_size)
            found["predictor"] = watch.seconds()
            loss = model(images, *self.masks).loss
            whole = watch.seconds()
        found["loss and signs"] = max(whole - sum(found.values()) + found["masks"], 0.0)
        loss.backward()
        found["backward"] = watch.seconds()
        self.optimizer.step()
        self.optimizer.zero_grad()
        found["optimizer"] = watch.seconds()
        model.update_target_encoder(0.996)
        found["moving average"] = watch.seconds()
        return found


class _Stopwatch:
    """Seconds since it was last asked, when the device has done what it was told."""

    def __init__(self, device: torch.device):
        self.device, self.last = device, 0.0
        self.seconds()

    def seconds(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self.last = self.last, time.perf_counter()
        return self.last - before


def format_step_cost(found: dict) -> str:
    """The measurements as two tables."""
    cells = step_rows(found, RACERS)
    factor = found["factor"]
    used = " and ".join("{median:.1%} ({low:.1%} - {high:.1%})".format(**found["mfu"][name]) for name in RACERS)
    shares = [["part of ours", "share"], *([name, f"{share:.1%}"] for name, share in found["parts"].items())]
    return "\n".join(
        [
            f"{found['size']}, {found['batch_size']} images, {found['precision']}, {found['device']}, "
            f"{found['threads']} threads",
            *markdown_table(cells),
            f"\n{factor['median']:.2f} times the speed ({factor['low']:.2f} - {factor['high']:.2f}); without the "
            f"regulariser the losses differ by {found['difference']:.1e}",
            f"{found['flops_per_image'] / 1e9:.2f} GFLOP an image of the authors' step, at {used} of the "
            f"{found['matmul_rate'] / 1e9:,.0f} GFLOP/s of large products here\n",
            *markdown_table(shares),
        ]
    )
