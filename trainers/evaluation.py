"""How good a frozen encoder is: kNN and a linear probe on its embeddings, beside a random encoder and raw pixels.

The kNN is the weighted one of InstDisc and DINO (arXiv 1805.01978, 2104.14294). The linear probe is multinomial
logistic regression with an L2 penalty on standardised embeddings; no choice is made on the test images.

Shapes: n images to vote or fit, m test images, D width of an embedding, K classes.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from scipy.optimize import minimize
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import has_file

from modeling_cjepa import CJepaConfig, CJepaForPreTraining, CJepaModel
from modeling_cjepa.configuration_cjepa import pair
from trainers.datasets import ImageDataset, ImageSource, sample_seed, seeded
from trainers.diagnostics import feature_std, rankme
from trainers.errors import InputError
from trainers.transforms import eval_transform, normalize

# Up to 10,000: embeddings with few strong directions, such as a random encoder's, need weak penalties.
C_GRID = tuple(10.0**power for power in range(-4, 5))
_MAX_RAW_PIXELS = 32
_SIMILARITIES_AT_ONCE = 2**25


@dataclass
class EvaluationArguments:
    """How a frozen encoder is evaluated."""

    num_neighbors: int = field(default=20, metadata={"help": "neighbours that vote in the kNN evaluation"})
    temperature: float = field(default=0.07, metadata={"help": "temperature T of their weights exp(cosine / T)"})
    eval_batch_size: int = field(default=256, metadata={"help": "images of a batch in evaluation"})
    dataloader_num_workers: int = field(default=0, metadata={"help": "processes that load images; 0: the main one"})
    seed: int = field(default=0, metadata={"help": "seed of random encoders and of what the linear probe holds out"})
    num_random_encoders: int = field(
        default=1, metadata={"help": "randomly initialised encoders of the same size to compare with"}
    )


class LinearProbe(NamedTuple):
    """
    Result of [`linear_predict`].

    Args:
        predictions (`torch.Tensor` of shape `(m,)`): Class indices.
        C (`float`): The inverse penalty chosen, in scikit-learn's sense.
        converged (`bool`): Whether the last fit converged.
    """

    predictions: torch.Tensor
    C: float
    converged: bool


def extract_embeddings(
    encoder: nn.Module,
    dataset: torch.utils.data.Dataset,
    mean,
    std,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    progress: bool = True,
    num_workers: int = 0,
    description: str = "embedding images",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    The embeddings of all images, in their order; in bfloat16 arithmetic on a GPU.

    Args:
        encoder (`nn.Module`): Gives a `pooler_output` (B, D), such as [`CJepaModel`].
        dataset (`Dataset`): Gives `pixel_values` (C, H, W) uint8 and, if there are any, `labels`.
        mean, std (`list[float]`): Of the channels, for pixels in [0, 1].
        batch_size (`int`): Images at once.
        device (`torch.device`, *optional*): Where to; the encoder is moved there. Where it is when not given.
        progress (`bool`): Whether to show a bar.
        num_workers (`int`): Processes that load images.
        description (`str`): What the bar says.

    Returns:
        The embeddings, float32 (n, D), and the labels, int64 (n,) or None; both on the CPU.
    """
    device = _device_of(encoder) if device is None else torch.device(device)
    on_gpu = device.type == "cuda"
    # a generator of its own: the loader draws a seed for its workers, and shall not draw it from the caller's
    generator = torch.Generator()
    loader = DataLoader(dataset, batch_size, num_workers=num_workers, pin_memory=on_gpu, generator=generator)
    was_training = encoder.training
    encoder.to(device).eval()
    embeddings, labels = [], []
    try:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            for batch in tqdm(loader, desc=description, unit="batch", disable=not progress):
                pixel_values = normalize(batch["pixel_values"].to(device, non_blocking=True), mean, std)
                embeddings.append(encoder(pixel_values).pooler_output.float().cpu())
                labels.append(batch.get("labels"))
    finally:
        encoder.train(was_training)
    return torch.cat(embeddings), None if labels[0] is None else torch.cat(labels)


def _device_of(encoder: nn.Module) -> torch.device:
    return next((parameter.device for parameter in encoder.parameters()), torch.device("cpu"))


def knn_predict(
    train_x: torch.Tensor,
    train_y: torch.Tensor,
    test_x: torch.Tensor,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> torch.Tensor:
    """
    Classes by the vote of the k nearest train embeddings, weighted by exp(cosine similarity / temperature).

    Args:
        train_x (`torch.Tensor` of shape `(n, D)`), train_y (`(n,)`, int64): The voters and their classes.
        test_x (`torch.Tensor` of shape `(m, D)`): The embeddings to classify.
        num_classes (`int`): Number of classes K.
        k (`int`): Number of neighbours; all train embeddings if there are fewer.
        temperature (`float`): T > 0.

    Returns:
        `torch.Tensor` of shape `(m,)`: Class indices, int64.
    """
    train_x, test_x = F.normalize(train_x.float(), dim=1), F.normalize(test_x.float(), dim=1)
    predictions = []
    for rows in test_x.split(max(1, _SIMILARITIES_AT_ONCE // len(train_x))):
        nearest = (rows @ train_x.T).topk(min(k, len(train_x)), dim=1)
        # relative to the nearest one, which changes no vote and cannot overflow
        weights = ((nearest.values - nearest.values[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(rows), num_classes).scatter_add_(1, train_y[nearest.indices], weights)
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def linear_predict(
    train_x: torch.Tensor, train_y: torch.Tensor, test_x: torch.Tensor, seed: int = 0, progress: bool = False
) -> LinearProbe:
    """
    Classes by logistic regression on standardised embeddings, with C chosen on a tenth of the train embeddings.

    C goes up `C_GRID` until three in a row do worse than the best; the fit with the best C is then made on all train
    embeddings. The objective is that of scikit-learn's `LogisticRegression`.

    Args:
        train_x (`torch.Tensor` of shape `(n, D)`), train_y (`(n,)`, int64): Embeddings to fit, and their classes.
        test_x (`torch.Tensor` of shape `(m, D)`): The embeddings to classify.
        seed (`int`): Chooses the tenth that is held out.
        progress (`bool`): Whether to show a bar.

    Returns:
        [`LinearProbe`].

    Raises:
        InputError: No class has a second train image to hold out.
    """
    classes, targets = train_y.unique(return_inverse=True)
    kept, held_out = _hold_out(targets, seed)
    std, mean = torch.std_mean(train_x.float(), dim=0, correction=0)
    std = std.where(std > 0, 1)
    x = (train_x.float() - mean) / std
    variances, axes = _principal_axes(x)
    x = x @ axes
    best_score, best_C, num_worse = -1.0, C_GRID[0], 0
    for C in tqdm(C_GRID, desc="linear probe", unit="fit", disable=not progress):
        weight, bias, _ = _fit(x[kept], targets[kept], len(classes), C, variances)
        score = ((x[held_out] @ weight + bias).argmax(dim=1) == targets[held_out]).float().mean().item()
        num_worse = num_worse + 1 if score < best_score else 0
        if score > best_score:
            best_score, best_C = score, C
        if num_worse == 3:
            break
    weight, bias, converged = _fit(x, targets, len(classes), best_C, variances)
    logits = ((test_x.float() - mean) / std) @ axes @ weight + bias
    return LinearProbe(classes[logits.argmax(dim=1)], best_C, converged)


def _hold_out(targets: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions to fit on and a random tenth to choose C on; of each class at least one image is fitted."""
    order = np.random.default_rng(seed).permutation(len(targets))
    _, first_of_class = np.unique(targets.cpu().numpy()[order], return_index=True)
    spare = np.delete(order, first_of_class)
    if len(spare) == 0:
        raise InputError("There is one train image of each class, and the linear probe needs more; give more images.")
    held_out = spare[: max(len(targets) // 10, 1)]
    kept = np.setdiff1d(order, held_out)
    return torch.from_numpy(kept).to(targets.device), torch.from_numpy(held_out).to(targets.device)


def _principal_axes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Variances (R,) and directions (D, R) of the principal axes of x (n, D), with R = min(n, D)."""
    if len(x) < x.shape[1]:
        _, singular_values, axes = torch.linalg.svd(x, full_matrices=False)
        return singular_values.square() / len(x), axes.T
    return torch.linalg.eigh(x.T @ x / len(x))


def _fit(x: torch.Tensor, targets: torch.Tensor, num_classes: int, C: float, variances: torch.Tensor):
    """
    The minimum of sum of losses * C + |weights|^2 / 2: weights (R, K), bias (K,), and whether it was reached.

    scikit-learn's solvers take thousands of steps where few directions carry most of the variance, as in the
    embeddings of a random or collapsed encoder. The columns of x (n, R) are along principal axes with the given
    variances, so here each gets a step length of its own, which leaves the minimum where it is.
    """
    num_images, width = x.shape
    penalty = 1 / (num_images * C)
    curvature = max(num_classes - 1, 1) / num_classes**2  # of the loss, when nothing is known yet
    step = torch.rsqrt(curvature * variances.clamp_min(0) + penalty)[:, None]
    one_hot = F.one_hot(targets, num_classes).to(x)

    def unpack(flat):
        scaled = torch.from_numpy(flat).to(x).view(width + 1, num_classes)
        return scaled[:-1] * step, scaled[-1]

    def loss_and_gradient(flat):
        weight, bias = unpack(flat)
        log_probabilities = torch.log_softmax(x @ weight + bias, dim=1)
        loss = -(log_probabilities * one_hot).sum(dtype=torch.float64) / num_images
        loss = loss + penalty / 2 * weight.double().square().sum()
        residual = (log_probabilities.exp() - one_hot) / num_images
        gradient = torch.cat([step * (x.T @ residual + penalty * weight), residual.sum(0, keepdim=True)])
        return loss.item(), gradient.double().flatten().cpu().numpy()

    # a loss that changes by less than a millionth changes no prediction that matters
    options = {"maxiter": 1000, "maxcor": 20, "ftol": 1e-6}
    start = np.zeros((width + 1) * num_classes)
    result = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", options=options)
    return *unpack(result.x), bool(result.success)


def accuracy_interval(num_correct: int, num_total: int) -> tuple[float, float]:
    """
    The 95 % Wilson score interval of an accuracy: what chance in the choice of the test images leaves open.

    Args:
        num_correct (`int`), num_total (`int`): Correct predictions of how many, at least 1.

    Returns:
        `(float, float)`: Low and high, in percent.
    """
    z = NormalDist().inv_cdf(0.975)
    share, weight = num_correct / num_total, z * z / num_total
    centre = (share + weight / 2) / (1 + weight)
    half = math.sqrt(share * (1 - share) * weight + weight * weight / 4) / (1 + weight)
    return 100 * max(centre - half, 0.0), 100 * min(centre + half, 1.0)


def evaluate_encoder(
    encoder: nn.Module,
    train: ImageDataset,
    test: ImageDataset,
    mean,
    std,
    arguments: EvaluationArguments,
    label: str = "target encoder",
    device: torch.device | str | None = None,
) -> dict:
    """
    kNN, linear probe and diagnostics of one frozen encoder.

    Args:
        encoder (`nn.Module`), mean, std, device: As in [`extract_embeddings`].
        train, test ([`ImageDataset`]): Labelled images; the classes of `test` are among those of `train`.
        arguments ([`EvaluationArguments`]): How.
        label (`str`): What the row is called.

    Returns:
        `dict`: `encoder` (the label); `knn` and `linear`, percent correct; `knn_interval`, `linear_interval`, 95 %;
        `linear_C`, `linear_converged`; `rankme` and `feature_std` of the test embeddings; `dim`, their width.

    Raises:
        InputError: The embeddings are not finite.
    """
    device = _device_of(encoder) if device is None else torch.device(device)
    settings = {"batch_size": arguments.eval_batch_size, "num_workers": arguments.dataloader_num_workers}
    train_x, train_y, test_x, test_y = (
        tensor.to(device if device.type == "cuda" else "cpu")
        for dataset, images in ((train, "train"), (test, "test"))
        for tensor in extract_embeddings(
            encoder, dataset, mean, std, device=device, description=f"{label}: {images} images", **settings
        )
    )
    if not (train_x.isfinite().all() and test_x.isfinite().all()):
        raise InputError(f"The embeddings of the {label} are not finite; its training diverged, take an earlier one.")
    num_classes = int(train_y.max()) + 1
    knn = knn_predict(train_x, train_y, test_x, num_classes, arguments.num_neighbors, arguments.temperature)
    probe = linear_predict(train_x, train_y, test_x, arguments.seed, progress=True)
    row = {"encoder": label}
    for name, predictions in (("knn", knn), ("linear", probe.predictions)):
        num_correct = int((predictions == test_y).sum())
        row[name] = 100 * num_correct / len(test_y)
        row[f"{name}_interval"] = list(accuracy_interval(num_correct, len(test_y)))
    return row | {
        "linear_C": probe.C,
        "linear_converged": probe.converged,
        "rankme": rankme(test_x),
        "feature_std": feature_std(test_x),
        "dim": test_x.shape[1],
    }


class RawPixels(nn.Module):
    """An "encoder" whose embedding is the image itself, area-reduced to 32 pixels a side if it is larger."""

    def forward(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """Images (B, C, H, W) as embeddings (B, C * H * W)."""
        size = [min(side, _MAX_RAW_PIXELS) for side in pixel_values.shape[-2:]]
        return BaseModelOutputWithPooling(pooler_output=F.interpolate(pixel_values, size, mode="area").flatten(1))


def evaluate_baselines(
    config: CJepaConfig,
    train: ImageDataset,
    test: ImageDataset,
    mean,
    std,
    arguments: EvaluationArguments,
    device: torch.device | str | None = None,
) -> list[dict]:
    """
    The rows an encoder has to beat: randomly initialised ones of its size, and raw pixels in [0, 1].

    Args:
        config ([`CJepaConfig`]): The encoder's.
        train, test, mean, std, arguments, device: As in [`evaluate_encoder`].

    Returns:
        `list[dict]`: A row for each of `num_random_encoders`, then one for the pixels.
    """
    rows = []
    for index in range(arguments.num_random_encoders):
        with seeded(sample_seed(arguments.seed, index)):
            encoder = CJepaModel(config)
        label = "random encoder" if arguments.num_random_encoders == 1 else f"random encoder {index + 1}"
        rows.append(evaluate_encoder(encoder, train, test, mean, std, arguments, label, device))
    sizes = pair(config.image_size)
    reduced = "x".join(str(min(side, _MAX_RAW_PIXELS)) for side in sizes)
    label = "raw pixels" if max(sizes) <= _MAX_RAW_PIXELS else f"raw pixels, reduced to {reduced}"
    return [*rows, evaluate_encoder(RawPixels(), train, test, [0.0] * 3, [1.0] * 3, arguments, label, device)]


def evaluate_model(
    model: "str | Path | CJepaForPreTraining | CJepaModel",
    train_source: ImageSource,
    test_source: ImageSource,
    arguments: EvaluationArguments | None = None,
    image_mean=IMAGENET_DEFAULT_MEAN,
    image_std=IMAGENET_DEFAULT_STD,
) -> dict:
    """
    Evaluates a model beside a random encoder and raw pixels, on images of its own size.

    Args:
        model (`str`, `Path` or a model): A folder, the id of a model on the Hub, or a model, used where it is.
        train_source, test_source ([`ImageSource`]): Labelled images.
        arguments ([`EvaluationArguments`], *optional*): How; the defaults when not given.
        image_mean, image_std (`list[float]`): Of the channels, where the folder has no image processor to say.

    Returns:
        `dict`: `rows` of [`evaluate_encoder`] (the target encoder, the context encoder if the model has one, the
        baselines), the data sets' names and sizes, `chance` (percent: always saying the most frequent test class),
        and the settings.

    Raises:
        InputError: There is no whole C-JEPA model, images have no labels, or a test class is not in the train images.
    """
    arguments = arguments or EvaluationArguments()
    train_source, test_source = _with_common_classes(train_source, test_source)
    if isinstance(model, str | Path):
        image_mean, image_std = _image_statistics(model) or (image_mean, image_std)
        model = _load_model(model).to("cuda" if torch.cuda.is_available() else "cpu")
    pretraining = isinstance(model, CJepaForPreTraining)
    encoders = {"target encoder": model.cjepa, "context encoder": model.context_encoder} if pretraining else {}
    encoders = encoders or {"encoder": model.base_model}
    transform = eval_transform(pair(model.config.image_size))
    images = ImageDataset(train_source, transform), ImageDataset(test_source, transform)
    settings = (*images, image_mean, image_std, arguments)
    rows = [evaluate_encoder(encoder, *settings, label) for label, encoder in encoders.items()]
    rows += evaluate_baselines(model.config, *settings, device=model.device)
    return {
        "train_dataset": train_source.name,
        "test_dataset": test_source.name,
        "num_train_images": len(train_source),
        "num_test_images": len(test_source),
        "num_classes": len(train_source.label_names),
        "chance": 100 * float(np.bincount(test_source.labels).max()) / len(test_source),
        "num_neighbors": min(arguments.num_neighbors, len(train_source)),
        "temperature": arguments.temperature,
        "seed": arguments.seed,
        "image_size": list(pair(model.config.image_size)),
        "image_mean": list(image_mean),
        "image_std": list(image_std),
        "rows": rows,
    }


def _with_common_classes(train: ImageSource, test: ImageSource) -> tuple[ImageSource, ImageSource]:
    """Both sources with the classes that train images have, numbered alike: each may have numbered its own."""
    for source in (train, test):
        if source.labels is None:
            raise InputError(f"{source.name} has no labels; say which with --label_column.")
        if len(source.labels) != len(source) or len(source) == 0:
            raise InputError(f"{source.name} has {len(source)} images and {len(source.labels)} labels; mend it.")
        if min(source.labels) < 0:
            raise InputError(f"{source.name} has images with label {min(source.labels)}, which is none; choose "
                             "another split or mend it.")  # fmt: skip
    train_names, test_names = _class_names(train), _class_names(test)
    names = list(dict.fromkeys(train_names[label] for label in np.unique(train.labels)))
    numbers = {name: number for number, name in enumerate(names)}
    unseen = [test_names[label] for label in np.unique(test.labels) if test_names[label] not in numbers]
    if unseen:
        shown = ", ".join(unseen[:5]) + (", ..." if len(unseen) > 5 else "")
        raise InputError(f"{test.name} has images of {len(unseen)} classes that no image of {train.name} has "
                         f"({shown}); evaluate on splits with the same classes.")  # fmt: skip
    return tuple(
        dataclasses.replace(
            source, labels=np.array([numbers[class_names[label]] for label in source.labels]), label_names=names
        )
        for source, class_names in ((train, train_names), (test, test_names))
    )


def _class_names(source: ImageSource) -> list[str]:
    return source.label_names or [str(label) for label in range(max(source.labels) + 1)]


def load_encoder_config(path: str | Path) -> CJepaConfig:
    """
    The configuration of a saved model.

    Args:
        path (`str` or `Path`): Its folder, or its id on the Hub.

    Returns:
        [`CJepaConfig`].

    Raises:
        InputError: There is no C-JEPA model.
    """
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is neither a folder with a C-JEPA model nor the id of one on the Hub ({_first_line(error)}); "
            "give a folder such as runs/mine/final."
        ) from error
    if not isinstance(config, CJepaConfig):
        raise InputError(f"{path} is a model of type {config.model_type!r}, not 'cjepa'; give a C-JEPA model.")
    return config


def _load_model(path: str | Path) -> CJepaForPreTraining | CJepaModel:
    """A saved model with all of its weights, in float32; only its encoder, unless it is one of pre-training."""
    architectures = load_encoder_config(path).architectures or []
    cls = CJepaForPreTraining if "CJepaForPreTraining" in architectures else CJepaModel
    try:
        model, info = cls.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"The weights of {path} cannot be loaded ({_first_line(error)}); save it again.") from error
    missing = sorted(info["missing_keys"])
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise InputError(f"{path} lacks {len(missing)} weights of a {cls.__name__} ({shown}); save it again.")
    return model


def _image_statistics(path: str | Path) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation of the channels that a model's image processor says, if it has one."""
    if not has_file(path, "preprocessor_config.json"):
        return None
    try:
        processor = AutoImageProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"The image processor of {path} cannot be loaded ({_first_line(error)}).") from error
    return list(processor.image_mean), list(processor.image_std)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def format_table(results: dict) -> str:
    """
    The results of [`evaluate_model`] as text that is valid Markdown, too.

    Args:
        results (`dict`): What [`evaluate_model`] returned.

    Returns:
        `str`: A line with sizes and settings, then the table; a last line if a probe did not converge.
    """
    header = ["encoder", "kNN % (95 % interval)", "linear % (95 % interval)", "RankMe"]
    cells = [header] + [_table_row(row) for row in results["rows"]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    if not all(row["linear_converged"] for row in results["rows"]):
        lines += ["", "\\* The linear probe did not converge."]
    return "\n".join([_settings_line(results), "", *lines])


def _table_row(row: dict) -> list[str]:
    percents = [f"{row[name]:.1f} ({'-'.join(f'{end:.1f}' for end in row[f'{name}_interval'])})" for name in (
        "knn", "linear")]  # fmt: skip
    percents[1] += "" if row["linear_converged"] else " \\*"
    return [row["encoder"], *percents, f"{row['rankme']:.1f} of {row['dim']}"]


def _settings_line(results: dict) -> str:
    height, width = results["image_size"]
    return (
        f"{results['num_test_images']:,} images of {results['test_dataset']}, {results['num_classes']} classes "
        f"(chance {results['chance']:.1f} %), {height}x{width} pixels; fitted on {results['num_train_images']:,} of "
        f"{results['train_dataset']}; kNN k {results['num_neighbors']}, T {results['temperature']:g}; seed "
        f"{results['seed']}."
    )
