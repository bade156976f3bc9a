"""Train a network, prune it, fine-tune it: three published systems, each from start to end.

    python examples/train_prune_finetune.py mobilenetv3 --epochs 10 --fine-tune-epochs 3
    python examples/train_prune_finetune.py distfit --depth 56 --data cifar10 --data-dir DIR
    torchrun --nproc-per-node 4 examples/train_prune_finetune.py blnet --data food101 --data-dir DIR

mobilenetv3  Liu & Lei 2023: MobileNetV3-Large, sparse training, six pruning rates
distfit      Zhang, Kou & Liu 2022: ResNets for CIFAR, filters that fit the distribution of norms
blnet        Yuan et al. 2023: Mobile_BLNet, sparse training, at the paper's share of MACs

The settings of training are those of the system's own recipe, for all rows alike, as far as the
command line does not say others. --macs 0.375 finds each recipe's rate for an equal share of the
MACs. Every finished stage, and every epoch of an unfinished one, is kept in --output: the same
command again goes on where it was stopped. results.json, results.md and results.png come there too.

The digits of scikit-learn (1,797 images of 8x8 pixels) are the data if no other are named: they
show that all works, and say little about which method is better. Needs rich, safetensors and, for
the digits, scikit-learn; torchvision for the other data sets; matplotlib for the plot.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training.data import DIGITS, Data, found_in, load, on_device
from training.loop import Place, Trainer, accuracy, fit, latency, place, write, write_text
from training.results import Line, Results, Run, lines

import fxprune
from fxprune import models, recipes
from fxprune.pruned import PrunedModule


@dataclass(frozen=True)
class System:
    """A published system: its network, its recipes (the first is the system's own) and, to set
    beside ours, the paper's figures."""

    network: str
    paper: str
    build: Callable[[argparse.Namespace, int], nn.Module]
    recipes: tuple[str, ...]
    rates: tuple[float, ...]
    macs: tuple[float, ...]
    cost: str
    figures: Callable[[Line, str], Mapping[str, str]]


# -- the papers' own figures -----------------------------------------------------------------------

# rate: accuracy (%), parameters (millions), FLOPs (as Network Slimming's code counts them)
LIU_LEI = {
    "cifar10": {
        0.0: (88.28, 4.22, 2.30e8),
        0.1: (87.86, 3.68, 2.17e8),
        0.2: (88.26, 3.26, 2.00e8),
        0.3: (88.23, 2.89, 1.81e8),
        0.4: (88.69, 2.61, 1.61e8),
        0.5: (88.55, 2.34, 1.38e8),
        0.6: (87.99, 2.16, 9.87e7),
    },
    "cifar100": {
        0.0: (61.47, 4.33, 2.30e8),
        0.1: (60.81, 3.59, 2.18e8),
        0.2: (61.25, 3.29, 2.07e8),
        0.3: (61.51, 2.93, 1.90e8),
        0.4: (60.92, 2.62, 1.70e8),
        0.5: (61.22, 2.38, 1.52e8),
        0.6: (61.16, 2.16, 1.18e8),
    },
}
# after pruning: accuracy (%), parameters (millions), FLOPs (which are MACs, in millions)
YUAN = {
    "cifar10": (91.2, 0.1, 9.6),
    "cifar100": (71.5, 0.3, 12.7),
    "food101": (82.8, 1.0, 203.0),
}


def liu_lei(line: Line, data: str) -> Mapping[str, str]:
    """Tables 3 and 6 of Liu & Lei (2023), by rate. Their rate 0 is trained without the L1 term."""
    run = line.runs[0]
    known = LIU_LEI.get(data, LIU_LEI["cifar10"])
    if run["recipe"] not in ("", "mobilenetv3_sparsity_gamma") or run["rate"] not in known:
        return {}
    share, params, flops = known[run["rate"]]
    return {
        "accuracy, %": f"{share}",
        "parameters": f"{params} M",
        "slimming FLOPs": f"{flops / 1e6:.1f} M",
    }


def zhang(line: Line, data: str) -> Mapping[str, str]:
    """The one figure that could be read of Zhang, Kou & Liu (2022), for ResNet-110 on CIFAR-10."""
    if not line.runs[0]["recipe"].startswith("distribution_fit_resnet"):
        return {}
    return {"relative accuracy": "-0.14 % (ResNet-110)", "MACs": "over -62 %"}


def yuan(line: Line, data: str) -> Mapping[str, str]:
    if not line.runs[0]["recipe"].startswith("mobile_blnet_ratio_sum"):
        return {}
    share, params, macs = YUAN.get(data, YUAN["cifar10"])
    return {"accuracy, %": f"{share}", "parameters": f"{params} M", "MACs": f"{macs} M"}


# -- the systems -----------------------------------------------------------------------------------


def mobilenet(args: argparse.Namespace, classes: int) -> nn.Module:
    return models.mobilenet_v3_large(num_classes=classes, expand_first=True)


def resnet(args: argparse.Namespace, classes: int) -> nn.Module:
    return getattr(models, f"resnet{args.depth}")(num_classes=classes)


def blnet(args: argparse.Namespace, classes: int) -> nn.Module:
    """The layers for 224x224, or those for 32x32: what is nearer."""
    return models.mobile_blnet(num_classes=classes, image_size=224 if args.size > 128 else 32)


SYSTEMS = {
    "mobilenetv3": System(
        network="MobileNetV3-Large",
        paper="Liu & Lei 2023",
        build=mobilenet,
        recipes=("mobilenetv3_sparsity_gamma",),
        rates=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
        macs=(),
        cost="slimming",
        figures=liu_lei,
    ),
    "distfit": System(
        network="ResNet-{depth}",
        paper="Zhang, Kou & Liu 2022",
        build=resnet,
        recipes=(
            *(f"distribution_fit_resnet:{variant}" for variant in "ABC"),
            "l1_filters",
            "fpgm",
        ),
        rates=(0.5,),
        macs=(),
        cost="macs",
        figures=zhang,
    ),
    "blnet": System(
        network="Mobile_BLNet",
        paper="Yuan et al. 2023",
        build=blnet,
        recipes=("mobile_blnet_ratio_sum", "mobile_blnet_ratio_sum:share", "network_slimming"),
        rates=(),
        macs=(0.49,),
        cost="macs",
        figures=yuan,
    ),
}
SIZES = {
    "mobilenetv3": {"cifar10": 224, "cifar100": 224, "food101": 224, "": 32},
    "distfit": {},
    "blnet": {"food101": 224, "": 32},
}
"""Height and width that a network gets of a data set, and of all others; where nothing is said, the
images' own."""


@dataclass(frozen=True)
class Variant:
    """A row to make: a recipe at a rate or at a share of the MACs; no recipe is the dense net."""

    recipe: str = ""
    rate: float | None = None
    macs: float | None = None

    @property
    def asked(self) -> str:
        if self.macs is not None:
            return f"{self.macs:g} of the MACs"
        return "" if self.rate is None else f"rate {self.rate:g}"

    @property
    def file(self) -> str:
        """A name for its files."""
        return re.sub(r"[^\w.]+", "-", f"{self.recipe} {self.asked}".strip() or "dense")


@dataclass
class Experiment:
    """One call of the script."""

    args: argparse.Namespace
    system: System
    data: Data
    place: Place
    progress: Progress

    def __post_init__(self) -> None:
        args, own = self.args, recipes.find(self.args.training)
        if own.train is None or own.fine_tune is None:
            raise SystemExit(f"recipe {args.training} lacks settings of `train` or `fine_tune`")
        self.train = _changed(own.train, args.epochs, args.lr, args.batch)
        self.tune = _changed(own.fine_tune, args.fine_tune_epochs, args.fine_tune_lr, args.batch)
        self.sparse = _sparse(own.sparse, args.sparsity)
        for recipe in args.recipes:
            recipes.find(recipe)  # one that is not there is better found now than after training

    @property
    def example(self) -> Tensor:
        return torch.zeros(2, 3, self.data.size, self.data.size)

    def settings(self) -> dict[str, Any]:
        """All that decides what comes out, but for seeds and rows."""
        parts = {"train": self.train, "fine_tune": self.tune, "sparse": self.sparse}
        names = ("system", "data", "depth", "steps", "amp")
        settings = {name: getattr(self.args, name) for name in names} | {"size": self.data.size}
        settings |= {name: part and part.model_dump(mode="json") for name, part in parts.items()}
        return json.loads(json.dumps(settings))

    def variants(self) -> list[Variant]:
        args = self.args
        at = [{"rate": rate} for rate in args.rates] + [{"macs": share} for share in args.macs]
        asked = (Variant(recipe, **one) for recipe in args.recipes for one in at)
        return [*dict.fromkeys((Variant(), *asked))]

    def check(self) -> None:
        """What would end a row, before hours of training: a recipe that does not fit the network,
        or is not the one that an earlier run began the row with."""
        for variant in self.variants()[1:]:
            for seed in range(self.args.seeds):
                check_same(self.file(seed, variant).with_suffix(".recipe.json"), variant.recipe)
        model = self.system.build(self.args, self.data.classes)
        for recipe in self.args.recipes:
            check_fits(model, self.example, recipe, self.args.rates, self.args.macs)

    # -- stages ------------------------------------------------------------------------------------

    def runs(self) -> list[Run]:
        """Every row of every seed; those that are finished are read."""
        found, variants = [], self.variants()
        with self.stage("stages", self.args.seeds * (1 + len(variants))) as advance:
            for seed in range(self.args.seeds):
                dense = self.trained(seed)
                advance()
                for variant in variants:
                    found.append(self.row(seed, dense, variant))
                    advance()
        return sorted(found, key=lambda run: run["seed"])

    def trained(self, seed: int) -> nn.Module:
        """The dense network, trained; from its file where there is one."""
        file = self.args.output / f"seed{seed}" / "trained.safetensors"
        torch.manual_seed(seed)
        if not file.exists():
            model = self.system.build(self.args, self.data.classes)
            self.fit(model, self.train, file, seed, "training", self.sparse)
            self.finished(file)
        model = self.system.build(self.args, self.data.classes)  # as one that was not just trained
        model.load_state_dict(load_file(file))
        return model.eval()

    def file(self, seed: int, variant: Variant) -> Path:
        return self.args.output / f"seed{seed}" / f"{variant.file}.json"

    def row(self, seed: int, dense: nn.Module, variant: Variant) -> Run:
        """What one variant of a trained network comes to; from its file where there is one."""
        file = self.file(seed, variant)
        if file.exists():
            return read_json(file)
        if variant.recipe and self.place.main:
            text = json.dumps(pruning_of(variant.recipe), indent=1)
            write_text(file.with_suffix(".recipe.json"), text)
        run: Run = {"seed": seed, "recipe": variant.recipe, "asked": variant.asked}
        model, run["rate"] = self.pruned(dense, variant)
        counts = fxprune.count(model, self.example)
        run["before"] = accuracy(model, self.data, self.place)
        title = f"fine-tuning {variant.recipe or 'dense'} {variant.asked}"
        self.fit(model, self.tune, file.with_suffix(".safetensors"), seed, title)
        run["after"] = accuracy(model, self.data, self.place)
        run |= {"parameters": counts.parameters, "macs": counts.macs, "slimming": counts.slimming}
        if self.place.main:
            run |= self.timed(model, dense)
            if isinstance(model, PrunedModule):
                write_text(file.with_suffix(".plan.json"), model.fxprune.plan.to_json())
            write_text(file, json.dumps(run, indent=1))
        self.finished(file)
        return run

    def pruned(self, dense: nn.Module, variant: Variant) -> tuple[nn.Module, float]:
        """A smaller network and the rate that made it; a copy for the dense variant."""
        if not variant.recipe:
            return copy.deepcopy(dense), 0.0
        rate = variant.rate or 0.0
        if variant.macs is not None:
            rate = rate_for(dense, self.example, variant.recipe, variant.macs)
        model = fxprune.prune(dense, self.example, recipe=variant.recipe, rate=rate)
        return model, rate

    def fit(
        self, model: nn.Module, how: Any, file: Path, seed: int, title: str, sparse: Any = None
    ) -> None:
        """Train, and write the weights; the last checkpoint stays until the stage is finished."""
        checkpoint = file.with_suffix(".checkpoint")
        trainer = Trainer(
            model, self.data, how, self.place, sparse=sparse, seed=seed, steps=self.args.steps
        )
        with self.stage(f"seed {seed}: {title}", trainer.steps) as advance:
            fit(trainer, checkpoint, advance)
        if self.place.main:
            state = {name: t.cpu().contiguous() for name, t in model.state_dict().items()}
            write(file, lambda temporary: save_file(state, temporary))

    def finished(self, file: Path) -> None:
        """A stage has all its files."""
        if self.place.main:
            file.with_suffix(".checkpoint").unlink(missing_ok=True)
        self.place.wait()

    def timed(self, model: nn.Module, dense: nn.Module) -> dict[str, float]:
        x = torch.rand(self.args.latency_batch, *self.example.shape[1:])
        both = latency([model, dense], x, self.place, self.args.latency_rounds)
        return dict(zip(("ms", "dense_ms"), both, strict=True))

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Callable[[], None]]:
        """A progress bar, for as long as the stage lasts."""
        task = self.progress.add_task(title, total=total)
        yield lambda: self.progress.advance(task)
        self.progress.remove_task(task)

    # -- results -----------------------------------------------------------------------------------

    def trained_for(self) -> str:
        cap = f", at most {self.args.steps} steps each" if self.args.steps else ""
        return f"{self.train.epochs} epochs, fine-tuned for {self.tune.epochs}{cap}"

    def results(self, runs: Sequence[Run]) -> Results:
        args, on = self.args, self.args.data
        known: dict[str, Sequence[str]] = {"mobilenetv3": [*LIU_LEI], "blnet": [*YUAN]}
        theirs = on if on in known.get(args.system, ()) else "cifar10"
        network = self.system.network.format(depth=args.depth)
        about = self.settings() | {
            "network": network,
            "images": [len(self.data.train), len(self.data.test)],
            "seeds": args.seeds,
            "latency_batch": args.latency_batch,
            "processes": self.place.world,
            "device": _device(self.place.device),
            "torch": torch.__version__,
            "fxprune": fxprune.__version__,
        }
        return Results(
            about=about,
            lines=lines(runs),
            paper=lambda line: self.system.figures(line, theirs),
            cost=self.system.cost,
            title=f"{network} on {self.data.name} ({self.data.size}x{self.data.size}), "
            f"seed {', '.join(map(str, range(args.seeds)))}, {self.trained_for()}",
            note=f'"paper:" are the figures of {self.system.paper} on {theirs}, with the '
            "network, training and epochs of that work.",
        )


def rate_for(model: nn.Module, x: Tensor, recipe: str, share: float, steps: int = 10) -> float:
    """The lowest rate, to 1 / 2**steps, at which at most `share` of the MACs are left. Halving
    finds it, as a higher rate never leaves more."""
    analysis = analysis_for(model, x, recipe)
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        left = share_left(analysis, recipe, middle)
        low, high = (middle, high) if left > share else (low, middle)
    if high == 1.0:
        raise SystemExit(unreachable(model, recipe, share))
    return high


def analysis_for(model: nn.Module, x: Tensor, recipe: str) -> fxprune.Analysis:
    own = recipes.find(recipe)
    return fxprune.analyze(model, x, mixing=own.mixing, scatter=own.scatter)


def share_left(analysis: fxprune.Analysis, recipe: str, rate: float) -> float:
    """The share of the MACs that is left at a rate."""
    plan = fxprune.plan(analysis, recipe=recipe, rate=rate)
    return fxprune.count(analysis, plan=plan).macs / analysis.macs()


def check_fits(
    model: nn.Module, x: Tensor, recipe: str, rates: Sequence[float], macs: Sequence[float]
) -> None:
    """Plan a recipe on a network, trained or not: the errors of `fxprune.plan`, and `SystemExit`
    for shares of the MACs that are too small to be reached.

    Only the highest rate tells of shares: the scores of a network that was not trained may all be
    alike, so that what is left at other rates says nothing of the trained one.
    """
    analysis = analysis_for(model, x, recipe)
    for rate in rates:
        fxprune.plan(analysis, recipe=recipe, rate=rate)
    least = share_left(analysis, recipe, 1 - 2**-10) if macs else 0.0
    if macs and least > min(macs):
        raise SystemExit(unreachable(model, recipe, min(macs)) + f"; {least:.2g} is the least")


def unreachable(model: nn.Module, recipe: str, share: float) -> str:
    return f"{recipe} cannot get {type(model).__name__} down to {share:g} of its MACs"


def _changed(how: Any, epochs: int | None, lr: float | None, batch: int | None) -> Any:
    """A recipe's training settings, with what the command line says instead."""
    given = {"epochs": epochs, "lr": lr, "batch": batch}
    return how.model_copy(update={k: v for k, v in given.items() if v is not None})


def _sparse(how: recipes.Sparse | None, s: float | None) -> recipes.Sparse | None:
    """A recipe's sparse training with another strength; none of strength 0."""
    if s is None:
        return how
    how = how or recipes.Sparse(s=1.0, all_bn=True)
    return how.model_copy(update={"s": s}) if s else None


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def check_settings(file: Path, settings: dict[str, Any], place: Place) -> None:
    """Write the settings where there are none; `SystemExit` where an earlier run had others."""
    if not file.exists() and place.main:
        write_text(file, json.dumps(settings, indent=1))
    place.wait()
    before = read_json(file)
    other = [name for name in settings if settings[name] != before.get(name)]
    if other:
        raise SystemExit(
            f"{file.parent} holds a run with another {', '.join(other)}; choose another --output"
        )


def pruning_of(recipe: str) -> dict[str, Any]:
    """All of a recipe that decides what is pruned."""
    others = {"name", "about", "source", "ours", "variants", "sparse", "train", "fine_tune"}
    return recipes.find(recipe).model_dump(mode="json", exclude=others)


def check_same(file: Path, recipe: str) -> None:
    """`SystemExit` where a row was begun with another version of its recipe."""
    if file.exists() and read_json(file) != pruning_of(recipe):
        raise SystemExit(
            f"{file.with_suffix('').stem} in {file.parent} was pruned by another version of recipe "
            f"{recipe}; choose another --output"
        )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; `SystemExit` for a file that holds none."""
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise SystemExit(f"{file} is broken ({error}); choose another --output") from None
    if not isinstance(found, dict):
        raise SystemExit(f"{file} is broken (no JSON object); choose another --output")
    return found


def _number(kind: Callable[[str], Any], fits: Callable[[Any], bool], what: str) -> Any:
    """A type for argparse: a number that `fits`."""

    def read(text: str) -> Any:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not fits(number):
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return number

    return read


COUNT = _number(int, lambda n: n >= 1, "a whole number of at least 1")
COUNT_OR_ZERO = _number(int, lambda n: n >= 0, "a whole number of at least 0")
POSITIVE = _number(float, lambda n: 0 < n < math.inf, "a finite number above 0")
STRENGTH = _number(float, lambda n: 0 <= n < math.inf, "a finite number of at least 0")
SHARE = _number(float, lambda n: 0 < n < 1, "a number between 0 and 1")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("system", choices=SYSTEMS)
    add("--output", type=Path, help="folder for all files (default: train-SYSTEM)")
    add("--seeds", type=COUNT, default=1, help="how many trainings, with seeds 0, 1, ...")

    add(
        "--data",
        default=DIGITS,
        help="digits, cifar10, cifar100, fashion, food101, FILE.npz, or a folder with one of them",
    )
    add("--data-dir", type=Path, help="where a data set that is named lies")
    add("--download", action="store_true", help="fetch the data set into --data-dir")
    add("--size", type=COUNT, help="height and width that images are brought to, in pixels")
    add("--workers", type=COUNT_OR_ZERO, default=4, help="processes that read images (food101)")

    add("--depth", type=int, default=20, choices=(20, 32, 44, 56, 110), help="distfit's ResNet")
    add("--recipes", nargs="+", help="names, name:variant or files of one's own")
    add("--training", metavar="RECIPE", help="whose training is taken (default: the system's own)")
    add("--rates", nargs="+", type=SHARE, help="pruning rates")
    add("--macs", nargs="+", type=SHARE, help="shares of the MACs to leave; finds the rates")

    add("--epochs", type=COUNT, help="of the dense network")
    add("--fine-tune-epochs", type=COUNT, help="of every row")
    add("--lr", type=POSITIVE)
    add("--fine-tune-lr", type=POSITIVE)
    add("--batch", type=COUNT, help="over all processes")
    add("--sparsity", type=STRENGTH, help="strength of the L1 term in sparse training; 0: none")
    add("--steps", type=COUNT, help="at most so many steps a training")

    add("--device", default="auto", help="cpu, cuda, cuda:1; auto takes a GPU where there is one")
    add("--amp", action="store_true", help="float16 on GPUs, bfloat16 on CPUs")
    add("--channels-last", action="store_true")
    add("--threads", type=COUNT, help="of the CPU (default: all)")
    add("--latency-batch", type=COUNT, default=32, help="images for the times")
    add("--latency-rounds", type=COUNT, default=15)
    return _filled(parser.parse_args(argv))


def _filled(args: argparse.Namespace) -> argparse.Namespace:
    """The system's own choices where none were given."""
    system = SYSTEMS[args.system]
    if Path(args.data).is_dir():
        args.data, args.data_dir = found_in(Path(args.data)), Path(args.data)
    args.output = args.output or Path(f"train-{args.system}")
    sizes = SIZES[args.system]
    args.size = args.size or sizes.get(args.data, sizes.get(""))
    args.recipes = args.recipes or list(system.recipes)
    args.training = args.training or system.recipes[0]
    if args.rates is None and args.macs is None:
        args.rates, args.macs = system.rates, system.macs
    args.rates, args.macs = args.rates or (), args.macs or ()
    return args


def loaded(args: argparse.Namespace, *, download: bool = False) -> Data:
    return load(args.data, args.data_dir, size=args.size, workers=args.workers, download=download)


def main(argv: Sequence[str] | None = None) -> None:
    """Errors that are the caller's to mend end the script with their message alone."""
    try:
        run(arguments(argv))
    except (fxprune.FxpruneError, OSError) as error:
        raise SystemExit(str(error)) from error


def run(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    here = place(args.device, amp=args.amp, channels_last=args.channels_last)
    if here.main:
        data = loaded(args, download=args.download)
    here.wait()  # until all is fetched
    if not here.main:
        data = loaded(args)
    wide = None if sys.stdout.isatty() else 200  # a file has no width to fold a table to
    console = Console(quiet=not here.main, width=wide)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        made = Experiment(args, SYSTEMS[args.system], on_device(data, here.device), here, progress)
        made.check()
        check_settings(args.output / "settings.json", made.settings(), here)
        runs = made.runs()
    if here.main:
        results = made.results(runs)
        console.print(results.table())
        for name in results.write(args.output):
            console.print(f"{args.output}/{name}" if name.startswith("results") else name)
    here.leave()


if __name__ == "__main__":
    main()
