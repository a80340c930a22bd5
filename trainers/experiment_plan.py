"""An experiment as a file says it, and the runs it is made of: every method with every seed and every swept value."""

import itertools
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from trainers.errors import InputError
from trainers.flags import closest
from trainers.recipes import Recipe, read_recipe
from trainers.resources import experiment_path

ACCURACIES = ("knn", "linear")
FIGURES = ("bars", "curves", "map")
# what the runner sets of each run
_OF_THE_RUNNER = {
    "seed": "--seeds chooses them",
    "output_dir": "--output names the folder of all runs",
    "resume_from_checkpoint": "runs are gone on with by themselves",
    "evaluate": "all runs are evaluated",
}


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
    """

    base: str
    recipe: str
    settings: dict
    seed: int
    swept: dict

    @property
    def method(self) -> str:
        """What it is called: the method and the swept values, such as `i-jepa, ema_momentum 0.5`."""
        return ", ".join([self.base, *(f"{key} {value:g}" for key, value in self.swept.items())])

    @property
    def place(self) -> Path:
        """Its folder, relative to that of all runs."""
        return Path(self.method.replace(", ", "-").replace(" ", "_").replace("/", "_"), f"seed-{self.seed}")

    def read(self, output: Path, **settings) -> Recipe:
        """Its recipe, with a folder in that of all runs, and with further settings."""
        own = {"seed": self.seed, "output_dir": str(output / self.place), "evaluate": False}
        return read_recipe(self.recipe, self.settings | own | settings)


@dataclass
class Experiment:
    """
    What is compared with what.

    Args:
        name (`str`): The file's stem.
        title (`str`): What it asks, in a line.
        dataset (`str`): What its rows call the images, such as `cifar10-10k`.
        recipe (`str`): The recipe of all runs.
        methods (`dict`): By their names the keys in which they differ; `recipe` may be one of them.
        seeds (`list[int]`): Every method is trained once with each.
        settings (`dict`): Keys laid on the recipes of all methods.
        sweep (`dict`): Keys with a list of values each: every method is trained with every combination. Keys that
            shall have the same value are given together, as in `ema_momentum, final_ema_momentum`; runs are called by
            the first.
        num_checkpoints (`int`): At how many places of a run, equally far apart, it is evaluated; the last is its end.
        context_encoder (`bool`): Whether C-JEPA's context encoder is evaluated, too.
        level (`int` or `"all"`, *optional*): Of a stack, whose figures are the method's own; the top one when not
            given. Those of the others are rows of their own.
        baselines (`bool`): Whether what has to be beaten is evaluated, too: of each run the encoder before training,
            and once raw pixels.
        figure (`"bars"`, `"curves"` or `"map"`): How it is drawn: the ends of the runs side by side, their course, or
            two swept keys as rows and columns.
        reach (`dict`): Percents, by the names of accuracies; of each method it is told after how many images they
            were reached.
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
    baselines: bool = True
    figure: str = "bars"
    reach: dict[str, float] = field(default_factory=dict)

    def runs(self) -> list[Run]:
        """All runs, seed by seed, so that the first seed of all methods is known soon."""
        return [
            self._run(method, values, seed)
            for seed in self.seeds
            for values in itertools.product(*self.sweep.values())
            for method in self.methods
        ]

    @property
    def swept(self) -> dict[str, list]:
        """The swept values by the keys that runs are called by."""
        return {keys.split(", ")[0]: values for keys, values in self.sweep.items()}

    def _run(self, method: str, values: tuple, seed: int) -> Run:
        own = dict(self.methods[method])
        recipe = own.pop("recipe", self.recipe)
        of_keys = zip(self.sweep, values, strict=True)
        settings = {key: value for keys, value in of_keys for key in keys.split(", ")}
        return Run(method, recipe, self.settings | own | settings, seed, dict(zip(self.swept, values, strict=True)))


def read_experiment(path_or_name: str, overrides: dict | None = None) -> Experiment:
    """
    Reads an experiment and checks the recipe of every run.

    Args:
        path_or_name (`str`): A YAML file, or the name of a shipped experiment.
        overrides (`dict`, *optional*): Keys of a recipe to be laid on all runs.

    Returns:
        [`Experiment`].

    Raises:
        InputError: There is no such file, or it says what cannot be run; the message names the key.
    """
    path, overrides = experiment_path(path_or_name), overrides or {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML ({' '.join(str(error).split())}); mend it.") from error
    experiment = _checked(values, path)
    _check_overrides(overrides, experiment)
    experiment.settings = experiment.settings | overrides
    for run in experiment.runs():
        try:
            run.read(Path("runs"))
        except InputError as error:
            raise InputError(f"{path}, {run.method}: {error}") from error
    return experiment


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


def _checked(values, path: Path) -> Experiment:
    """The experiment of a file's keys; `InputError` for the first that is unknown, missing or of another kind."""
    if not isinstance(values, dict):
        raise InputError(f"{path} is not a mapping of keys to values; write lines such as `title: ...`.")
    kinds = {each.name: each.type for each in fields(Experiment) if each.name != "name"}
    for key in values:
        if key not in kinds:
            close = closest(str(key), kinds)
            raise InputError(f"{path}: unknown key {key!r}{f' (did you mean {close!r}?)' if close else ''}; an "
                             f"experiment has {', '.join(kinds)}.")  # fmt: skip
    for key in ("title", "dataset", "recipe", "methods"):
        if not values.get(key):
            raise InputError(f"{path}: {key!r} is missing; every experiment has title, dataset, recipe and methods.")
    if not isinstance(values["methods"], dict):
        raise InputError(f"{path}: methods={values['methods']!r} must be a mapping of names to keys that differ.")
    values["methods"] = {str(name): own or {} for name, own in values["methods"].items()}
    experiment = Experiment(path.stem, **values)
    _check_kinds(experiment, path)
    return experiment


def _check_kinds(experiment: Experiment, path: Path):
    for name, value in [*experiment.methods.items(), ("settings", experiment.settings), ("reach", experiment.reach)]:
        if not isinstance(value, dict):
            raise InputError(f"{path}: {name}: {value!r} must be a mapping of keys to values.")
    lists = {"seeds": experiment.seeds, **(experiment.sweep if isinstance(experiment.sweep, dict) else {"sweep": 0})}
    for name, value in lists.items():
        if not isinstance(value, list) or not value or not all(isinstance(each, int | float) for each in value):
            raise InputError(f"{path}: {name}={value!r} must be a list of numbers, one or more.")
    if experiment.figure not in FIGURES:
        raise InputError(f"{path}: figure={experiment.figure!r} is not known; choose one of {', '.join(FIGURES)}.")
    if experiment.figure == "map" and len(experiment.sweep) != 2:
        raise InputError(f"{path}: a map has two swept keys, and `sweep` has {len(experiment.sweep)}.")
    for name in experiment.reach:
        if name not in ACCURACIES:
            raise InputError(f"{path}: reach: {name!r} is not known; choose {' or '.join(ACCURACIES)}.")
    if not isinstance(experiment.num_checkpoints, int) or experiment.num_checkpoints < 1:
        raise InputError(f"{path}: num_checkpoints={experiment.num_checkpoints!r} must be a whole number from 1 up.")
    for name in (key for own in (experiment.settings, *experiment.methods.values()) for key in own):
        _refuse_runners_own(name, f"{path}: {name}")


def _check_overrides(overrides: dict, experiment: Experiment):
    """Refuses flags for what the runs of an experiment differ in."""
    swept = [key for keys in experiment.sweep for key in keys.split(", ")]
    for name in overrides:
        _refuse_runners_own(name, f"--{name}")
        if name in swept or any(name in own for own in experiment.methods.values()):
            raise InputError(f"--{name} is what runs of {experiment.name} differ in; write an experiment of your own.")


def _refuse_runners_own(name: str, where: str):
    if name in _OF_THE_RUNNER:
        raise InputError(f"{where} is set for each run of an experiment ({_OF_THE_RUNNER[name]}); leave it out.")
