"""What writing features costs beside the encoder's forward passes alone, measured on this machine in turns."""

import statistics
import tempfile
import time

import torch

from modeling_cjepa import CJepaConfig, CJepaModel
from trainers.benchmark import quartiles, shown
from trainers.decoding import decode_image
from trainers.embedding import encoding
from trainers.errors import InputError
from trainers.feature_encoder import FeatureArguments
from trainers.features import write_features
from trainers.reports import markdown_table
from trainers.sources import DataArguments
from trainers.tables import ImageTable, load_tables
from trainers.transforms import eval_transform

# a ViT-S for images of CIFAR-10's size
VIT_S = {
    "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536,
    "image_size": 32, "patch_size": 4,
}  # fmt: skip


def benchmark_features(
    batch_size: int = 64, num_rounds: int = 5, num_images: int = 256, dataset: str = "scenes", **changes
) -> dict:
    """
    Times the forward passes of a ViT-S, and the whole of [`~features.write_features`], on the same images.

    Args:
        batch_size (`int`): Images of a batch.
        num_rounds (`int`): Timed rounds, each once of either.
        num_images (`int`): Images of a round.
        dataset (`str`): Where they are from; rendered scenes of 32 pixels, or what `--dataset` takes.
        changes: Fields of [`CJepaConfig`] other than those of a ViT-S.

    Returns:
        `dict`: `num_images`, `device`, and of `forward` and `features` a `dict` of `median`, `low` and `high`
        (quartiles) in seconds a round; `factor`, features over forward, the median of the rounds' ratios.

    Raises:
        InputError: A number is too small to measure with.
    """
    if batch_size < 1 or num_rounds < 2 or num_images < 1:
        raise InputError(f"--batch_size {batch_size} and --num_images {num_images} must be 1 or more and --rounds "
                         f"{num_rounds} 2 or more.")  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = CJepaModel(CJepaConfig(**VIT_S | changes)).to(device)
    data = DataArguments(dataset=dataset)
    tables = load_tables(data, model.config.image_size, num_images=num_images, progress=False)
    split, table = next(iter(tables.items()))
    pixels = _pixels(table, model.config.image_size)
    arguments = FeatureArguments(batch_size=batch_size, split=[split], num_images=num_images, disable_tqdm=True)

    def forward():
        with encoding(model, data.image_mean, data.image_std, device) as encode:
            for batch in pixels.split(batch_size):
                encode(batch).pooler_output.float().cpu()

    def features():
        with tempfile.TemporaryDirectory() as folder:
            write_features(model, data, folder, arguments, {split: table})

    times: dict[str, list[float]] = {"forward": [], "features": []}
    for round_number in shown(num_rounds, "features"):
        for name, work in (("forward", forward), ("features", features)):
            started = time.perf_counter()
            work()
            if round_number > 0:  # the first one sets things up
                times[name].append(time.perf_counter() - started)
    found = {"num_images": len(pixels), "device": device.type}
    found |= {name: quartiles(seconds) for name, seconds in times.items()}
    # of the two that followed each other: what else the machine did slowed both
    found["factor"] = statistics.median(b / a for a, b in zip(times["forward"], times["features"], strict=True))
    return found


def _pixels(table: ImageTable, image_size: int) -> torch.Tensor:
    """The views of all images (n, 3, H, W) uint8, decoded beforehand."""
    view = eval_transform((image_size, image_size))
    return torch.stack([view(decode_image(row[table.image_column])) for row in table.rows])


def format_feature_cost(found: dict) -> str:
    """The measurements as a table."""
    cells = [["ViT-S, 32x32 pixels", "images", "seconds (quartiles)", "images/s", "times the forward pass"]]
    for name, called, factor in (
        ("forward", "forward passes alone", "1"),
        ("features", "cjepa features: read, decode, embed, write", f"{found['factor']:.3f}"),
    ):
        times = found[name]
        spread = f"{times['median']:.2f} ({times['low']:.2f} - {times['high']:.2f})"
        speed = f"{found['num_images'] / times['median']:.0f}"
        cells.append([called, str(found["num_images"]), spread, speed, factor])
    return "\n".join(markdown_table(cells))
