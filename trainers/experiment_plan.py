"""An experiment as a file says it, and the runs it is made of: every method with every seed and every swept value."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path

from trainers.errors import InputError
from trainers.flags import closest
from trainers.recipes import Recipe, read_recipe


@dataclass(frozen=True)
class Run:
    """
    One pre-training of an experiment.

    Args:
        base (`str`): The method as the file names it.
        recipe (`str`): A recipe's name or file.
        settings (`dict`): The keys that are laid on it.
        seed (`int`): Of the run.
        swept (`dict`): Those of the settings that the experiment sweeps.
        rival (`str`, *optional*): Which of [`~rivals.RIVALS`] is trained in place of the recipe's model.
    """

    base: str
    recipe: str
    settings: dict
    seed: int
    swept: dict
    rival: str | None = None

    @property
    def method(self) -> str:
        """What it is called: the method and the swept values, such as `i-jepa, ema_momentum 0.5`."""
        return ", ".join([self.base, *(f"{key} {value}" for key, value in self.swept.items())])

    @property
    def place(self) -> Path:
        """Its folder, relative to that of all runs."""
        return Path(self.method.replace(", ", "-").replace(" ", "_"), f"seed-{self.seed}")

    def read(self, output: Path, **settings) -> Recipe:
        """Its recipe, with a folder in that of all runs, and with further settings."""
        own = {"seed": self.seed, "output_dir": str(output / self.place), "evaluate": False}
        return read_recipe(self.recipe, self.settings | own | settings, "its settings")


@dataclass
class Experiment:
    """
    What is compared with what.

    Args:
        name (`str`): The file's stem.
        title (`str`): What it asks, in a line.
        dataset (`str`): What its rows call the images, such as `cifar10-10k`.
        recipe (`str`): The recipe of all runs.
        methods (`dict`): By their names the keys in which they differ; `recipe` may be one of them, and
            `rival`, which trains another model of the recipe's sizes, one of [`~rivals.RIVALS`].
        seeds (`list[int]`): Every method is trained once with each.
        settings (`dict`): Keys laid on the recipes of all methods.
        sweep (`dict`): Keys with a list of values each: every method is trained with every combination. Keys that
            shall have the same value are given together, as in `ema_momentum, final_ema_momentum`; runs are called by
            the first.
        num_checkpoints (`int`): At how many places of a run, equally far apart, it is evaluated; the last is its end.
        context_encoder (`bool`): Whether C-JEPA's context encoder at the end is evaluated, too.
        level (`int` or `"all"`, *optional*): Of a stack, whose figures are the method's own; the top one when not
            given. Those of the others are rows of their own.
        structure (`bool`): Whether it is told, too, how far apart the encoders at the end keep the classes: their
            silhouette, and their normalised mutual information (NMI) with what k-means finds; also of the coarse
            classes, where these are known.
        baselines (`bool`): Whether what has to be beaten is evaluated, too: of each run a random encoder of the same
            kind, and once raw pixels.
        figure (`"bars"`, `"curves"` or `"map"`): How it is drawn: the ends of the runs side by side, their course, or
            two swept keys as rows and columns.
        reach (`dict`): Percents, by the names of accuracies; of each method it is told after how many images and
            minutes they were found to be reached.
    """

    name: str
    title: str
    dataset: str
    recipe: str
    methods: dict[str, dict]
    seeds: list[int] = field(default_factory=lambda: [42, 43, 44])
    settings: dict = field(default_factory=dict)
    sweep: dict[str, list] = field(default_factory=dict)
    num_checkpoints: int = 1
    context_encoder: bool = False
    level: int | str | None = None
    structure: bool = False
    baselines: bool = True
    figure: str = "bars"
    reach: dict[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What its rows call it: its name, with hyphens."""
        return self.name.replace("_", "-")

    def runs(self) -> list[Run]:
        """All runs, seed by seed, so that the first seed of all methods is known soon."""
        return [
            self._run(method, values, seed)
            for seed in self.seeds
            for values in itertools.product(*self.sweep.values())
            for method in self.methods
        ]

    @property
    def swept_keys(self) -> list[str]:
        """All keys that are swept."""
        return [key for keys in self.sweep for key in _split(keys)]

    @property
    def swept(self) -> dict[str, list]:
        """The swept values by the keys that runs are called by."""
        return {_split(keys)[0]: values for keys, values in self.sweep.items()}

    def _run(self, method: str, values: tuple, seed: int) -> Run:
        own = dict(self.methods[method])
        recipe, rival = own.pop("recipe", self.recipe), own.pop("rival", None)
        of_keys = zip(self.sweep, values, strict=True)
        settings = {key: value for keys, value in of_keys for key in _split(keys)}
        swept = dict(zip(self.swept, values, strict=True))
        return Run(method, recipe, self.settings | own | settings, seed, swept, rival)


def _split(keys: str) -> list[str]:
    """The keys that are swept together."""
    return [key.strip() for key in keys.split(",")]


def choose_runs(experiment: Experiment, methods: list[str] | None, seeds: list[int] | None) -> list[Run]:
    """
    The runs of some methods and seeds.

    Args:
        experiment ([`Experiment`]): Of which.
        methods (`list[str]`, *optional*): Methods as the file names them, which are all of their swept runs, or as a
            run's is called; all when not given.
        seeds (`list[int]`, *optional*): Which; all when not given.

    Returns:
        `list` of [`Run`].

    Raises:
        InputError: The experiment has no such method or seed.
    """
    runs = experiment.runs()
    known = {run.method for run in runs} | experiment.methods.keys()
    for method in methods or []:
        if method not in known:
            close = closest(method, known)
            raise InputError(
                f"--methods {method!r} is not one of {experiment.name}"
                f"{f' (did you mean {close!r}?)' if close else ''}; --list lists them."
            )
    for seed in seeds or []:
        if seed not in experiment.seeds:
            raise InputError(f"--seeds {seed} is not one of {experiment.name}, which has {experiment.seeds}.")
    return [
        run
        for run in runs
        if (not methods or run.method in methods or run.base in methods) and (not seeds or run.seed in seeds)
    ]
