"""What a search chooses from: training options, each from a range or a list of values.

NAME=LOW..HIGH is a range, NAME=LOW..HIGH:log one over whose logarithm values are spread evenly,
NAME=A,B,C a list; the sizes of several layers are joined by dashes, as in hidden=128,256-128. NAME
alone has the range below. What an option is, and what fits it, the table of options says.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpn_triton.data.datasets import DataSource
from gpn_triton.training.options import NETWORK_OPTIONS, OPTIONS, check_names
from gpn_triton.training.parser import configuration

if TYPE_CHECKING:
    from optuna import Trial

# what is searched where nothing is named; the options' own defaults lie within
DEFAULT = {
    "lr": "3e-4..3e-2:log",
    "batch_size": "16..128:log",
    "weight_decay": "0,1e-5,1e-4,1e-3",
    "dropout": "0..0.7",
    "time_bins": "10..100:log",
    "channel_bin": "1,2,5,10",
    "scale": "counts,log",
    "channel_shift": "0..40",
    "channel_stretch": "0..0.1",
    "channel_gain": "0..0.8",
    "time_stretch": "0..0.4",
    "event_drop": "0..0.3",
    "noise": "0..0.3",
}
GROUPS = ("Binning", "Augmentation", "Network", "Optimisation")
# what can be searched: options of how a network is made and trained, on data that stay the same
SEARCHABLE = {f.name: f for f in OPTIONS if f.metadata["result"] and f.metadata["group"] in GROUPS}
RANGE, LOG = "..", ":log"


def _joined(read: Callable[[str], Any]) -> Callable[[str], tuple]:
    """Reads values that dashes join, but for the dash of an exponent."""
    return lambda text: tuple(read(part) for part in re.split(r"(?<![eE])-", text))


# how a value is read, and how what a range of it holds is drawn, by an option's type
_READ = {
    "int": int, "float": float, "str": str,
    "tuple[int, ...]": _joined(int), "tuple[float, ...]": _joined(float),
}  # fmt: skip
_RANGES = ("int", "float")


@dataclass(frozen=True)
class Searched:
    """One option of a space.

    name: the option's. spec: its range or list, as given after NAME=. values: of a list its values,
    as the option takes them, by their texts; of a range its ends.
    """

    name: str
    spec: str
    values: dict[str, Any]

    @property
    def is_range(self) -> bool:
        return RANGE in self.spec

    @property
    def is_log(self) -> bool:
        return self.spec.endswith(LOG)

    def __str__(self) -> str:
        return f"{self.name}={self.spec}"

    def draw(self, trial: Trial) -> Any:
        """A trial's value, as Optuna's sampler chooses it, or as it was chosen before."""
        if not self.is_range:
            return self.values[trial.suggest_categorical(self.name, list(self.values))]
        low, high = self.values.values()
        suggest = trial.suggest_int if isinstance(low, int) else trial.suggest_float
        return suggest(self.name, low, high, log=self.is_log)

    def text_of(self, value: Any) -> Any:
        """What Optuna calls a value; None where the value is not in the space."""
        if self.is_range:
            low, high = self.values.values()
            return value if value is not None and low <= value <= high else None
        return next((text for text, known in self.values.items() if known == value), None)


Space = tuple[Searched, ...]


def read_space(texts: Sequence[str], given: dict[str, Any]) -> Space:
    """The space that NAME=... texts describe; of no text the default one, as far as it fits.

    Args:
        texts: see this module's head. given: options that are fixed, by name.
    Raises:
        ValueError: an unknown option or none that can be searched, one that is fixed, too, an empty
            range, or values that do not fit the option or the others; the message names it.
    """
    base = configuration(given)
    # other bins make other data of these, and other data another task
    task = base.add_pairs or base.made not in (None, "synthetic")
    data = {f.name for f in dataclasses.fields(DataSource)} if task else set()
    if not texts:
        fixed = given.keys() | data | ({*NETWORK_OPTIONS} if "init_from" in given else set())
        free = [read_searched(f"{name}={spec}") for name, spec in DEFAULT.items()]
        space = tuple(s for s in free if s.name not in fixed and not misfit(given, s))
        if not space:
            raise ValueError("search: every option of the default space is fixed: name some")
        return space
    space = tuple(map(read_searched, texts))
    names = [searched.name for searched in space]
    for searched in space:
        name = searched.name
        if names.count(name) > 1:
            raise ValueError(f"search: {name} is named {names.count(name)} times")
        if name in given:
            raise ValueError(f"search: {name} is fixed, too: leave out one of the two")
        if name in data:
            raise ValueError(
                f"search: {name} makes another task of these data; fix it by --"
                + name.replace("_", "-")
            )
    for k in (1, 2):
        for some in itertools.combinations(space, k):
            if wrong := misfit(given, *some):
                raise ValueError(f"search: {wrong}")
    return space


def read_searched(text: str) -> Searched:
    """One option of a space; raises as read_space, as far as the option alone is concerned."""
    name, equals, spec = text.partition("=")
    name = name.strip().replace("-", "_")
    check_names([name], "search")
    if name not in SEARCHABLE:
        raise ValueError(f"search: expected an option of {', '.join(GROUPS)}, got {name}")
    if not equals and name not in DEFAULT:
        raise ValueError(f"search: {name}: expected a range or a list, as {name}=A,B,C")
    spec = spec.replace(" ", "") if equals else DEFAULT[name]
    kind = SEARCHABLE[name].type.split(" | ")[0]
    ranged, log = RANGE in spec, spec.endswith(LOG)
    if ranged and kind not in _RANGES:
        raise ValueError(f"search: {name}: expected a list of values, got {spec}")
    if log and not ranged:
        raise ValueError(f"search: {name}: expected LOW..HIGH before {LOG}, got {spec}")
    parts = spec.removesuffix(LOG).split(RANGE) if ranged else spec.split(",")
    try:
        values = {part: _READ[kind](part) for part in parts}
    except ValueError:
        kind = kind.replace("tuple[int, ...]", "sizes").replace("tuple[float, ...]", "numbers")
        raise ValueError(f"search: {name}: expected {kind}, got {spec}") from None
    if len(set(values.values())) < max(2, len(parts)):
        raise ValueError(f"search: {name}: expected two values or more that differ, got {spec}")
    if ranged:
        low, high, *more = values.values()
        if more or not low < high:
            raise ValueError(f"search: {name}: expected LOW{RANGE}HIGH with LOW < HIGH, got {spec}")
        if log and not low > 0:
            raise ValueError(f"search: {name}: expected LOW above 0 for {LOG}, got {spec}")
    return Searched(name, spec, values)


def misfit(given: dict[str, Any], *some: Searched) -> str | None:
    """What is wrong with any values of some options beside those that are fixed; None: nothing."""
    for values in _products(some):
        try:
            configuration(given | values)
        except ValueError as error:
            chosen = " and ".join(f"{name}={value}" for name, value in values.items())
            return f"{chosen}: {error}" if len(values) > 1 else str(error)
    return None


def _products(some: Sequence[Searched]) -> Iterator[dict[str, Any]]:
    """Each combination of what some options' lists hold, and of their ranges' ends."""
    for values in itertools.product(*(searched.values.values() for searched in some)):
        yield {s.name: value for s, value in zip(some, values, strict=True)}
