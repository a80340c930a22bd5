"""Has a run collapsed? A verdict on its log, in words, with what to change.

A loss cannot tell: it falls when features shrink, and rises in a healthy run when they come to differ more. So each
level's figures are compared with their own best so far, never with a fixed number; docs/doctor.md says where the few
thresholds come from.
"""

from dataclasses import asdict, dataclass, field

from modeling_cjepa.losses_cjepa import level_term
from trainers.doctor_advice import advise
from trainers.doctor_curves import Curve

# fewer logs than these tell nothing, nor does what is logged in the warm-up
MIN_LOGS = 5
# of the largest spread so far: with less the features have collapsed
COLLAPSED_SPREAD = 0.2
# of the largest effective rank so far, less 1: with less only few directions are left
COLLAPSED_RANK = 0.55
# features that change less than this, and a rank that does, have learned nothing
STILL = 0.1
# times the first loss: above it the run has diverged
DIVERGED_LOSS = 3.0
# a loss that has risen so far above its lowest, in a healthy run, is worth a sentence
RISEN_LOSS = 1.1
# of the width: an effective rank below it is worth a sentence, too; no alarm, since every run begins there
FEW_DIRECTIONS = 0.05
# figures of as many images as others, or of this share of them, are compared
ABOUT = 0.9

HEALTHY, TOO_SHORT = "healthy", "too short to tell"
COLLAPSED, DIMENSIONAL, DIVERGED, NOT_LEARNING = "collapsed", "dimensional collapse", "diverged", "not learning"
# the worst first
STATES = (DIVERGED, COLLAPSED, DIMENSIONAL, NOT_LEARNING, TOO_SHORT, HEALTHY)


@dataclass
class LevelDiagnosis:
    """
    What is said of one level.

    Args:
        level (`int`): From 0.
        state (`str`): One of `STATES`.
        sentences (`list[str]`): What is seen.
        turned (`int`, *optional*): The step at which an ill level was at its best.
    """

    level: int
    state: str
    sentences: list[str]
    turned: int | None = None


@dataclass
class Diagnosis:
    """
    What is said of a run.

    Args:
        state (`str`): The worst state of its levels.
        step (`int`, *optional*): The last one that was looked at.
        levels (`list[LevelDiagnosis]`): Each level, from the image up.
        advice (`list[str]`): What to change.
        note (`str`, *optional*): Why later logs were not looked at.
    """

    state: str
    step: int | None = None
    levels: list[LevelDiagnosis] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    note: str | None = None

    @property
    def is_ill(self) -> bool:
        """Whether something must change."""
        return self.state not in (HEALTHY, TOO_SHORT)

    def sentences(self) -> list[str]:
        """What is seen, of a stack with the level's number."""
        several = len(self.levels) > 1
        seen = [
            f"level {level.level}: {sentence}" if several else sentence
            for level in self.levels
            for sentence in level.sentences
        ]
        return [*seen, self.note] if self.note else seen

    def to_dict(self) -> dict:
        """As plain dictionaries and lists, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        advice = [f"To change: {sentence}" for sentence in self.advice]
        return "\n".join([f"{self.state}{f' at step {self.step}' if self.step else ''}", *self.sentences(), *advice])


def diagnose(history: list[dict], facts: dict | None = None) -> Diagnosis:
    """
    Judges a run, finished or not, by its log.

    Args:
        history (`list[dict]`): `trainer.state.log_history`; None in place of a number is one that was not finite.
        facts (`dict`, *optional*): What the run was set to, of [`~doctor_advice.run_settings`]: makes the advice
            concrete, and lets what is logged in the warm-up pass.

    Returns:
        [`Diagnosis`].
    """
    facts = facts or {}
    entries = comparable(history, facts.get("num_monitored_images"))
    if not entries:
        return Diagnosis(TOO_SHORT)
    levels = [_diagnose_level(_Level(entries, level, facts)) for level in range(_num_levels(entries))]
    state = worst(levels)
    step = entries[-1].get("step")
    is_stale = next(entry for entry in reversed(history) if "rankme" in entry) is not entries[-1]
    note = f"logs since step {step} are of too few images to be compared with those before" if is_stale else None
    return Diagnosis(state, step, levels, advise(state, facts, levels), note)


def comparable(history: list[dict], asked: int | None = None) -> list[dict]:
    """
    The logs of a history whose figures are of about as many images as those before them, or of more: n images cannot
    have an effective rank above n, and a run that was resumed begins again with few.

    Args:
        history (`list[dict]`): As in [`diagnose`].
        asked (`int`, *optional*): How many the run watches now. Logs of more, before that was lowered, are left out.
    """
    entries, most = [], 0
    for entry in history:
        number = entry.get("monitored_images", most)
        if "rankme" not in entry or number < ABOUT * most or (asked and ABOUT * number > asked):
            continue
        entries.append(entry)
        most = max(most, number)
    return entries


def worst(levels: list[LevelDiagnosis]) -> str:
    """The state of the level that is worst off."""
    return min((level.state for level in levels), key=STATES.index)


def what_is_left(history: list[dict]) -> list[dict[str, float]]:
    """
    What the verdict hangs on: of each level the share that is left of the largest spread and effective rank.

    Args:
        history (`list[dict]`): As in [`diagnose`], of one log or more.

    Returns:
        `list[dict]`: `spread` (the smaller one of the embeddings' and of what the regulariser sees) and `rank`.
    """
    entries = comparable(history)
    levels = [_Level(entries, number, {}) for number in range(_num_levels(entries))]
    return [
        {"spread": min(curve.left() for curve in (level.std, level.spread) if curve), "rank": level.rank.left(floor=1)}
        for level in levels
    ]


def _num_levels(entries: list[dict]) -> int:
    return sum(level_term("rankme", level) in entries[0] for level in range(len(entries[0])))


class _Level:
    """The curves of one level and what its sentences need."""

    def __init__(self, entries: list[dict], number: int, facts: dict):
        def curve(name: str, prefix: str = "") -> Curve:
            return Curve(entries, prefix + level_term(name, number))

        self.number, self.facts, self.entries = number, facts, entries
        self.std, self.rank = curve("feature_std"), curve("rankme")
        self.prediction = curve("prediction", "loss_")
        self.loss = self.prediction or Curve(entries, "loss")
        # what the regulariser sees, as far as its hinge lets it: 1 less the mean lack of standard deviation
        self.spread = curve("variance", "loss_")
        self.spread.points = [(step, 1 - value) for step, value in self.spread.points]

    @property
    def step(self) -> int:
        return self.entries[-1].get("step", 0)

    @property
    def since(self) -> int:
        """The first step that is judged."""
        earliest = self.entries[min(MIN_LOGS, len(self.entries)) - 1].get("step", 0)
        return max(earliest, self.facts.get("warmup_steps", 0))

    @property
    def width(self) -> int | None:
        """Of the embeddings, where it is known."""
        widths = self.facts.get("widths") or []
        return widths[self.number] if self.number < len(widths) else None

    def of_width(self) -> str:
        return f" of {self.width}" if self.width else ""


def _diagnose_level(level: _Level) -> LevelDiagnosis:
    for judge in (_diverged, _too_short, _shrunk, _flattened, _still):
        found = judge(level)
        if found:
            return LevelDiagnosis(level.number, *found)
    return LevelDiagnosis(level.number, HEALTHY, _healthy(level))


def _diverged(level: _Level):
    if any(curve.is_broken for curve in (level.std, level.rank, level.loss, level.spread)):
        return DIVERGED, [f"a figure of step {level.step} is not finite"]
    if level.loss and len(level.entries) >= MIN_LOGS and level.loss.last > DIVERGED_LOSS * level.loss.first > 0:
        return (
            DIVERGED,
            [f"the loss grew from {level.loss.first:.3g} to {level.loss.last:.3g}"],
            level.loss.lowest()[0],
        )
    return None


def _too_short(level: _Level):
    if len(level.entries) < MIN_LOGS or level.step < level.since:
        return TOO_SHORT, ["too few logs, or still in the warm-up"]
    return None


def _shrunk(level: _Level):
    for curve, what in (
        (level.std, "the embeddings' standard deviation"),
        (level.spread, "the standard deviation that the regulariser sees"),
    ):
        if curve.has_sunk(COLLAPSED_SPREAD, level.since):
            step, highest = curve.highest()
            fall = f"{what} fell from {highest:.2g} to {curve.last:.2g}{curve.dip(step)}"
            return COLLAPSED, [_with_loss(level, step, fall, "the features shrank")], step
    return None


def _flattened(level: _Level):
    step, highest = level.rank.highest()
    if not level.rank.has_sunk(COLLAPSED_RANK, level.since, floor=1):
        return None
    fall = f"effective rank {highest:.3g} -> {level.rank.last:.3g}{level.of_width()}{level.rank.dip(step)}"
    return DIMENSIONAL, [_with_loss(level, step, fall, "the features came to lie in few directions")], step


def _with_loss(level: _Level, step: int, fall: str, cause: str) -> str:
    """What fell, since when, and what the loss made of it."""
    since = f"in {level.step - step} steps"
    if not level.loss:
        return f"{cause}: {fall} {since}"
    before, now = level.loss.at(step), level.loss.last
    if now < before:
        return f"the loss fell ({before:.3g} -> {now:.3g}) because {cause}: {fall} {since}"
    return f"{cause}: {fall} {since}, and the loss does not show it ({before:.3g} -> {now:.3g})"


def _still(level: _Level):
    momentum = level.facts.get("ema_momentum", 0)
    # a target that keeps 0.996 of itself in a step has hardly moved in the first few hundred
    if level.step < 3 / (1 - momentum if momentum < 1 else 1):
        return None
    for curve in (level.std, level.rank):
        values = [value for _, value in curve.points[1:]]  # the first log is of a single batch
        if not values or max(values) > (1 + STILL) * curve.last or min(values) < (1 - STILL) * curve.last:
            return None
    return NOT_LEARNING, [
        f"the embeddings are as they were at the start: standard deviation {level.std.last:.2g}, effective "
        f"rank {level.rank.last:.3g}{level.of_width()}"
    ]


def _healthy(level: _Level) -> list[str]:
    """The figures, whether they are of few directions, and why the loss of a healthy run rises."""
    sentences = [
        f"effective rank {level.rank.first:.3g} -> {level.rank.last:.3g}{level.of_width()}, standard deviation "
        f"{level.std.first:.2g} -> {level.std.last:.2g}"
    ]
    if level.width and level.rank.last < FEW_DIRECTIONS * level.width:
        sentences.append(
            "nothing was lost, but these are few directions, less than a twentieth of the width: unless the rank "
            "still rises, neighbours may be no better than a random encoder's, which `cjepa evaluate` tells"
        )
    if not level.prediction:
        return sentences
    step, lowest = level.loss.lowest()
    if level.loss.last > RISEN_LOSS * lowest and level.std.last > level.std.at(step):
        sentences.append(
            f"the prediction loss has risen since step {step} ({lowest:.3g} -> {level.loss.last:.3g}) because the "
            f"targets differ more (standard deviation {level.std.at(step):.2g} -> {level.std.last:.2g}), so that "
            "there is more to predict: no sign of collapse"
        )
    return sentences
