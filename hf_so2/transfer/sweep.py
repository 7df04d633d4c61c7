"""A sweep from its flags to its verdicts: which trials to run, in which order, until when."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hf_so2.errors import ConfigurationError
from hf_so2.training.arguments import TRAINER_FIELDS
from hf_so2.transfer.proxies import Proxy, shared_settings
from hf_so2.transfer.reporting.sizes import judge_sizes
from hf_so2.transfer.reporting.verdict import Verdict
from hf_so2.transfer.runner import TrialTask, run_trial
from hf_so2.transfer.space import Space, default_grid, parse_grid, parse_ranges
from hf_so2.transfer.store import SweepStore, Wanted, study_name
from hf_so2.transfer.trials import Size, Trial, best_setting, finalists
from hf_so2.transfer.workers import run_tasks

MOST_EXTENSIONS = 4  # of a grid in one call; each makes every edge in question one value longer


@dataclass
class SweepArguments:
    """What to search and how long; the models, the optimizer, the data and the schedule are the training flags."""

    _argument_group_name = "sweep"

    widths: list[int] = field(default_factory=list, metadata={"help": "hidden sizes of the proxies"})
    depths: list[int] = field(
        default_factory=list, metadata={"help": "numbers of layers; there is a proxy for every width and depth"}
    )
    checkpoints: list[str] = field(
        default_factory=list, metadata={"help": "proxies to fine-tune instead of models from scratch"}
    )
    grid: list[str] = field(
        default_factory=list, metadata={"help": "values to try, as learning_rate=0.03,0.06 damping=1e-4,1e-3"}
    )
    search: list[str] = field(
        default_factory=list, metadata={"help": "ranges for Optuna to sample from, as learning_rate=0.01:0.5"}
    )
    trials: int | None = field(
        default=None,
        metadata={"help": "number of trials over all proxies, repetitions not counted; 12, or the size of --grid"},
    )
    minutes: float | None = field(default=None, metadata={"help": "start no trial after so many minutes"})
    seeds: int = field(default=3, metadata={"help": "runs of each finalist, with seeds counted up from --seed"})
    finalists: int = field(default=3, metadata={"help": "how many of the best settings of each proxy are repeated"})
    jobs: int = field(default=1, metadata={"help": "trials at a time, each on its share of the cores or its GPU"})
    extend: bool = field(
        default=False, metadata={"help": "make the grid longer where the optimum lies on its edge, and go on"}
    )
    compare: bool = field(
        default=False, metadata={"help": "do the same in the standard parametrization (the optimizer without _mup)"}
    )
    coordinate_check: bool = field(default=True, metadata={"help": "check the coordinates at the setting found"})
    storage: str | None = field(
        default=None, metadata={"help": "URL of the Optuna storage; default: sweep.db in --output_dir"}
    )

    def __post_init__(self) -> None:
        for name in ("trials", "seeds", "finalists", "jobs", "minutes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigurationError(name, value, "must be above 0")
        if self.grid and self.search:
            raise ConfigurationError("search", self.search, "excludes grid; give one of them")
        if self.grid and self.trials is not None:
            raise ConfigurationError("trials", self.trials, "has no effect with grid, every point of which is run")
        if self.search and self.extend:
            raise ConfigurationError("extend", True, "continues a grid; give wider ranges instead")

    def trials_per_proxy(self, proxies: int) -> int:
        """How many settings are tried with each proxy, unless a grid says so."""
        trials = 12 if self.trials is None else self.trials
        if trials < proxies:
            kind = "proxies" if self.depths else "widths"
            raise ConfigurationError("trials", trials, f"must be at least one for each of the {proxies} {kind}")
        return trials // proxies

    def space(self, learning_rate: float, proxies: int) -> Space:
        """What is searched; by default learning rates a factor 2 apart around `learning_rate`."""
        if self.search:
            return Space(ranges=parse_ranges(self.search))
        return Space(grid=parse_grid(self.grid) or default_grid(learning_rate, self.trials_per_proxy(proxies)))


class Sweep:
    """The trials of one optimizer over its proxies.

    Args:
        arguments: the sweep's flags.
        proxies: narrow ones first, of one width the shallow ones.

    Raises:
        ConfigurationError: values that the optimizer refuses.
    """

    store: SweepStore
    deadline: float | None

    def __init__(self, arguments: SweepArguments, proxies: Sequence[Proxy]) -> None:
        self.arguments, self.proxies = arguments, proxies
        _, _, training = proxies[0].arguments()
        self.optim = proxies[0].optim
        self.seed = int(training.seed)
        assert training.learning_rate is not None  # the arguments fill it
        self.space = arguments.space(training.learning_rate, len(proxies))
        given = {item.partition("=")[0].strip() for item in (training.optim_args or "").split(",")}
        for name in self.space.names:
            if given & {name, *(ours for ours, theirs in TRAINER_FIELDS.items() if theirs == name)}:
                raise ConfigurationError("optim_args", training.optim_args, f"must leave {name} to the search")
            for value in self.space.grid.get(name, self.space.ranges.get(name, ())):
                proxies[0].arguments(**{name: value})

    def open(self, store: SweepStore, deadline: float | None) -> None:
        """Takes up what is in the store.

        Args:
            store: where trials are kept.
            deadline: `time.monotonic()` after which no trial is started.

        Raises:
            ConfigurationError: the store holds a sweep with other settings.
        """
        self.store, self.deadline = store, deadline
        for proxy in self.proxies:
            store.open(self.optim, proxy.size, shared_settings(proxy, self.space))
        if self.space.grid:
            self.space = self.space.covering(dict(trial.params) for trial in self.trials())

    def trials(self) -> list[Trial]:
        """All finished ones, narrow proxies first."""
        return [
            replace(trial, depth=proxy.depth)
            for proxy in self.proxies
            for trial in self.store.trials(self.optim, proxy.size)
        ]

    def verdict(self) -> Verdict:
        """What the trials say as they are."""
        sizes = [(proxy.width, proxy.depth) for proxy in self.proxies]
        return judge_sizes(self.trials(), sizes, sampled=bool(self.space.ranges))

    def unfinished(self) -> int:
        """How many trials are still queued: the minutes ran out."""
        return sum(self.store.waiting(self.optim, proxy.size) for proxy in self.proxies)

    def run(self) -> None:
        """Search, extend the grid if asked to, repeat the finalists; prints a line for each trial."""
        self._search()
        for _ in range(MOST_EXTENSIONS if self.arguments.extend else 0):
            edges = self.verdict().edges
            if not edges or self.unfinished():
                break
            self.space = self.space.extended(edges)
            print("extended: " + ", ".join(f"{name} on its {side} edge" for name, side in edges), flush=True)
            self._search()
        if self.unfinished():
            return
        for proxy in self.proxies:
            chosen = finalists(self.store.trials(self.optim, proxy.size), self.arguments.finalists)
            further = range(self.seed + 1, self.seed + self.arguments.seeds)
            self._queue(proxy, [(dict(setting.params), seed) for setting in chosen for seed in further])
        self._run_queued()

    def _search(self) -> None:
        for proxy in self.proxies:
            if self.space.grid:
                self._queue(proxy, [(params, self.seed) for params in self.space.points()])
            else:
                count = self.arguments.trials_per_proxy(len(self.proxies))
                self._queue(proxy, [(None, self.seed)] * count)
        self._run_queued()

    def _queue(self, proxy: Proxy, wanted: Sequence[Wanted]) -> None:
        self.store.queue(self.optim, proxy.size, wanted)

    def _run_queued(self) -> None:
        waiting = {proxy.size: self.store.waiting(self.optim, proxy.size) for proxy in self.proxies}
        total, begun = sum(waiting.values()), time.monotonic()
        tasks = list(self._tasks(waiting))
        for count, task in enumerate(run_tasks(run_trial, tasks, self.arguments.jobs, self.deadline), start=1):
            left = (time.monotonic() - begun) / count * (total - count) / 60
            print(f"[{count}/{total}] {self._progress(task)}, about {left:.0f} min left", flush=True)

    def _tasks(self, waiting: dict[Size, int]) -> Iterator[TrialTask]:
        """Proxies in turn: a sweep that is cut short has tried the same with all of them."""
        for round_ in range(max(waiting.values(), default=0)):
            for proxy in self.proxies:
                if round_ < waiting[proxy.size]:
                    done = len(self.store.studies[self.optim, proxy.size].get_trials(deepcopy=False))
                    name = study_name(self.optim, proxy.size)
                    yield TrialTask(proxy.flags, name, self.store.url, self.space, sampler_seed=1000 * done + round_)

    def _progress(self, task: TrialTask) -> str:
        """The trial that ended last in the study of `task`, and the best so far."""
        proxy = next(proxy for proxy in self.proxies if study_name(self.optim, proxy.size) == task.study)
        trials = self.store.trials(self.optim, proxy.size)
        last = max(trials, key=lambda trial: trial.ended)
        best = best_setting(trials)
        result = f"{last.loss:.4f}" if last.outcome == "complete" else f"stopped ({last.outcome})"
        line = f"{self.optim} {proxy} {shown(last.params)} seed {last.seed}: {result} in {last.seconds:.0f} s"
        return line if best is None else f"{line}; best {best.mean:.4f} at {shown(best.params)}"


def shown(params: Mapping[str, float]) -> str:
    """`learning_rate=0.06 damping=0.001`."""
    return " ".join(f"{name}={value:.4g}" for name, value in params.items())
