"""What a training step of C-JEPA takes beside the authors', on the same batches and masks, and where the time goes."""

import statistics
import time

import torch

from modeling_cjepa.losses_cjepa import prediction_loss
from trainers.allocator import keep_freed_memory
from trainers.bare_steps import BareSteps, fields_of
from trainers.benchmark import loop_masks, quartiles, shown, step_rows
from trainers.dry_step import LiveBytes
from trainers.errors import InputError
from trainers.flops import matmul_rate, model_flops, wait_for
from trainers.precision import precision_name
from trainers.reference_step import ReferenceStep
from trainers.reports import markdown_table

RACERS = {
    "reference": "the authors', re-stated",
    "ours": "ours, with its regulariser",
    "shared_context": "ours, shared context",
    "mask_sets": "ours, two mask sets, too",
}
_FIELDS = {
    "ours": {},
    "shared_context": {"predictor_attention": "shared_context"},
    "mask_sets": {"predictor_attention": "shared_context", "num_mask_sets": 2},
}
# torch.compile's; by the second and third steps are recorded as CUDA graphs on a GPU
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# the largest difference of the two losses, without our regulariser, that leaves them the same function
_MOST_APART = {"float32": 1e-4, "bf16": 1e-2}


def benchmark_step(
    size: str = "cifar",
    batch_size: int = 64,
    num_rounds: int = 9,
    precision: str = "auto",
    compile_mode: str | None = None,
) -> dict:
    """
    Times whole steps of [`ReferenceStep`], I-JEPA's, and of ours, C-JEPA's with its regulariser, in turns.

    Ours is the same function; the other ones of [`RACERS`] are not. Each first draws its masks, the reference by a
    loop over the images; on a GPU the reference is given them, as workers draw them beside its steps. All then
    predict the same blocks of the same masks.

    Args:
        size (`str`): One of [`~bare_steps.SIZES`].
        batch_size (`int`): Masks of a step, and images but where they have two mask sets; an even number.
        num_rounds (`int`): Timed steps of each, after one that is not counted.
        precision (`"auto"`, `"float32"` or `"bf16"`): Of all; `auto` is what the device multiplies faster.
        compile_mode (`str`, *optional*): One of [`COMPILE_MODES`], torch.compile's, in which ours and its variants are
            compiled; all rounds then have the same masks. Not compiled when not given.

    Returns:
        `dict`: `size`, `batch_size`, `device`, `threads`, `precision`, `compile_mode`; by the names of [`RACERS`] the
        quartiles of `seconds`, of `factor` (the reference's seconds over the racer's, round by round), of
        `factor_of_ours` (the seconds of ours over the variant's) and of `mfu`,
        the share of `matmul_rate` (the device's, in FLOP/s) at which it does the `flops_per_image` of
        [`~flops.model_flops`] (the rounds' mean), which are the reference's for all, so that a step that saves some
        of that work has a higher one; `memory`, the bytes that a step takes at most beside weights and the optimizer's
        averages; `parts`, the share of our step, uncompiled, of each of its parts, taken one by one;
        `reference_masks`, the share of the reference's step in which its masks are drawn; and `difference` of the
        losses of reference and ours without the regulariser.

    Raises:
        InputError: There is no such size, precision or mode, too little to measure with, or the losses differ.
    """
    fields = fields_of(size)
    if batch_size < 2 or batch_size % 2 or num_rounds < 2:
        raise InputError(f"--batch_size {batch_size} must be an even number and --rounds {num_rounds} 2 or more.")
    if compile_mode not in (None, *COMPILE_MODES):
        raise InputError(f"--compile {compile_mode!r} is not known; choose {', '.join(COMPILE_MODES)}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = precision_name(precision, device)
    keep_freed_memory()  # of all alike
    race = _Race(fields, batch_size, precision, device, compile_mode)
    difference = race.difference()
    if difference > _MOST_APART[precision]:
        raise InputError(f"The losses of ours and of the reference differ by {difference:.1e}: it is no comparison.")
    rates = [matmul_rate(device, precision)]
    rounds = [race.round() for _ in shown(num_rounds, "steps")][1:]
    rates.append(matmul_rate(device, precision))  # what else the machine does slows one or the other
    return {
        "size": size, "batch_size": batch_size, "device": device.type, "threads": torch.get_num_threads(),
        "precision": precision, "compile_mode": compile_mode, "difference": difference,
        "memory": {name: race.memory(name) for name in RACERS},
    } | _summary(rounds, batch_size, max(rates))  # fmt: skip


def _summary(rounds: list[tuple[int, dict, float, dict]], batch_size: int, rate: float) -> dict:
    flops, seconds, loops, parts = zip(*rounds, strict=True)
    whole = sum(statistics.median(each[name] for each in parts) for name in parts[0])
    return {
        "seconds": {name: quartiles([each[name] for each in seconds]) for name in RACERS},
        "factor": {name: quartiles([each["reference"] / each[name] for each in seconds]) for name in _FIELDS},
        "factor_of_ours": {
            name: quartiles([each["ours"] / each[name] for each in seconds]) for name in _FIELDS if name != "ours"
        },
        "mfu": {
            name: quartiles([
                work * batch_size / each[name] / rate for work, each in zip(flops, seconds, strict=True)
            ])
            for name in RACERS
        },
        "flops_per_image": statistics.mean(flops), "matmul_rate": rate,
        "parts": {name: statistics.median(each[name] for each in parts) / whole for name in parts[0]},
        "reference_masks": statistics.median(
            loop / each["reference"] for loop, each in zip(loops, seconds, strict=True)
        ),
    }  # fmt: skip


class _Race:
    """Steps of the reference and of ours, which have the same weights, and of the variants, under the same masks."""

    def __init__(self, fields: dict, batch_size: int, precision: str, device: torch.device, compile_mode: str | None):
        fields = fields | {"layer_norm_eps": 1e-6}
        self.ours, *variants = (BareSteps(fields | changes, precision, device) for changes in _FIELDS.values())
        self.reference = ReferenceStep(self.ours.model, precision=precision)
        self.device, self.batch_size, self.keeps_masks = device, batch_size, compile_mode is not None
        self.images, self.generator = self.ours.images(batch_size), torch.Generator().manual_seed(0)
        self.masks = self.draw_masks()
        self.racers = dict(zip(RACERS, (self.reference, self.ours, *variants), strict=True))
        for steps in (self.ours, *variants) if self.keeps_masks else ():
            steps.run = torch.compile(steps.model, mode=compile_mode)

    def draw_masks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks of a step."""
        return self.ours.model.sample_masks(self.batch_size, device=self.device)

    def draw_reference_masks(self):
        """What masks cost the reference, whose steps are taken with ours: on a GPU it does not wait for them."""
        if self.device.type == "cpu":
            loop_masks(self.batch_size, self.ours.model.config.grid_size[0], self.generator)

    def take(self, name: str):
        """A step of a racer, which has as many masks as all."""
        num_sets = _FIELDS.get(name, {}).get("num_mask_sets", 1)
        self.racers[name].take(self.images[: self.batch_size // num_sets], *self.masks)

    def round(self) -> tuple[int, dict[str, float], float, dict[str, float]]:
        """
        Floating-point operations an image, the seconds of a step of each, those in which the reference draws masks,
        and those of the parts of ours.
        """
        context_ids, target_ids = self.masks
        flops = model_flops(self.ours.model.config, context_ids.shape[1], *target_ids.shape[1:])
        seconds, watch = {}, _Stopwatch(self.device)
        self.draw_reference_masks()
        loop = watch.seconds()
        self.take("reference")
        seconds["reference"] = loop + watch.seconds()
        for name in _FIELDS:
            self.draw_masks()
            self.take(name)
            seconds[name] = watch.seconds()
        return sum(flops.values()), seconds, loop, self.part_seconds()

    def memory(self, name: str) -> int:
        """Bytes that a step takes on top of what is there: those allocated on a GPU, those of tensors on a CPU."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.take(name)
            return torch.cuda.max_memory_allocated(self.device) - before
        with LiveBytes([self.images, *self.masks]) as live:
            before = live.now
            self.take(name)
        return live.peak - before

    @torch.no_grad()
    def difference(self) -> float:
        """How far the two losses of one batch are apart, without our regulariser."""
        with self.ours.autocast:
            ours = self.ours.model(self.images, *self.masks, regularizer_weight=0.0).loss
            return (ours - self.reference.loss(self.images, *self.masks)).abs().item()

    def part_seconds(self) -> dict[str, float]:
        """Seconds of the parts of a step of ours."""
        model, images, watch, found = self.ours.model, self.images, _Stopwatch(self.device), {}
        masks = self.draw_masks()
        found["masks"] = watch.seconds()
        self.masks = self.masks if self.keeps_masks else masks
        with self.ours.autocast:
            with torch.no_grad():
                (tokens,) = model.cjepa.encode(images)
            found["target encoder"] = watch.seconds()
            (level,) = model._levels(images, *self.masks)
            found["context encoder"] = watch.seconds()
            predictions = level.predict()
            found["predictor"] = watch.seconds()
        tokens = tokens.last_hidden_state
        targets = level.targets(tokens)
        prediction = prediction_loss(predictions, targets, model.config.prediction_loss)
        found["prediction loss"] = watch.seconds()
        level.regularizer_terms(level.rows(predictions), prediction)
        found["regulariser"] = watch.seconds()
        level.signs(predictions, targets, tokens)
        found["signs of collapse"] = watch.seconds()
        loss, _ = level.loss(predictions, targets, model.config.regularizer_weight, [])
        watch.seconds()  # of what was computed twice
        loss.backward()
        found["backward"] = watch.seconds()
        self.ours.optimizer.step()
        self.ours.optimizer.zero_grad()
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
        wait_for(self.device)
        before, self.last = self.last, time.perf_counter()
        return self.last - before


def format_step_cost(found: dict) -> str:
    """The measurements as two tables."""
    spread = "{median:.2f} ({low:.2f} - {high:.2f})"
    cells = step_rows(found["seconds"] | {"batch_size": found["batch_size"]}, RACERS)
    cells[0][2:] = ["mask sets/s", "times the speed", "times ours", "MFU", "MiB a mask set"]
    for row, name in zip(cells[1:], RACERS, strict=True):
        row += [
            *(
                spread.format(**found[factor][name]) if name in found[factor] else "1" if name == base else ""
                for factor, base in (("factor", "reference"), ("factor_of_ours", "ours"))
            ),
            f"{found['mfu'][name]['median']:.1%}",
            f"{found['memory'][name] / found['batch_size'] / 2**20:.2f}",
        ]
    shares = [["part of ours", "share"], *([name, f"{share:.1%}"] for name, share in found["parts"].items())]
    return "\n".join(
        [
            f"{found['size']}, {found['batch_size']} images, {found['precision']}, {found['device']}, "
            f"{found['threads']} threads{f', ours compiled ({mode})' if (mode := found['compile_mode']) else ''}",
            *markdown_table(cells),
            f"\nwithout the regulariser the losses of the first two differ by {found['difference']:.1e}; MFU is "
            f"{found['flops_per_image'] / 1e9:.2f} GFLOP an image of the authors' step, over the seconds and the "
            f"{found['matmul_rate'] / 1e9:,.0f} GFLOP/s of large products here; memory is that beside the weights; "
            f"the authors' masks, drawn by a loop, are {found['reference_masks']:.1%} of their step; "
            "a mask set is an image, but for the last one, where an image has two\n",
            *markdown_table(shares),
        ]
    )
