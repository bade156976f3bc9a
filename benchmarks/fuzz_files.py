"""Damaged, foreign and malicious files: a clear error or a right result, and no code run.

    python -m benchmarks.fuzz_files --count 10000 --jobs 2
    python -m benchmarks.fuzz_files --kind saved --seed 4711 --count 1     # one again

Plans, rules, recipes and saved networks are mutated: bits, cuts and splices of their bytes, and
values of what they say (other types, huge and odd numbers, deep nesting, swapped names). Of saved
networks a part gets a checksum that fits, as someone would write who knows the format. Each must
end in an `FxpruneError` whose fault is one line, or in something right: a plan that can be applied
and verified, rules that are read, a recipe that prunes, a network that is the one that was saved;
one with a checksum of its own may be any other network. A hook of Python's own watches for code
that is run, processes, sockets and files written. Failures print their seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load, save
from torch import nn

import fxprune
from fxprune import recipes, rules, saving

SECONDS = 20  # none may take longer
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 1e308, -1e-300, float("nan"), float("inf"),
    "", "x", "conv1", "../../etc/passwd", "__class__", "os.system", "torch.load", "a" * 3000,
    "\u202e\ud83d\ude00", "\n# %s{}", [], {}, [[]], [None], {"": {}}, "l1", "no", "1e-4", "*i -> i",
]  # fmt: skip


class Net(nn.Module):
    """What the files are of: a residual block, a gate, a size in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.gate = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8 * 4, 3)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv1(x)))
        x = x + self.conv2(x) * torch.sigmoid(self.gate(x))
        return self.head(x.view(-1, 32))


X = torch.rand(2, 3, 2, 2)


# -- mutations -------------------------------------------------------------------------------------


def of_bytes(good: bytes, random_: random.Random) -> bytes:
    """Bits, cuts, splices, lines."""
    data = bytearray(good)
    for _ in range(random_.choice((1, 1, 2, 5))):
        at, to = sorted(random_.randrange(len(data) + 1) for _ in range(2))
        choice = random_.randrange(6)
        if choice == 0 and at < len(data):
            data[at] ^= 1 << random_.randrange(8)
        elif choice == 1:
            del data[at:]
        elif choice == 2:
            del data[at : min(to, at + 40)]
        elif choice == 3:
            data[at:at] = data[to : to + random_.randrange(60)]
        elif choice == 4:
            data[at:at] = bytes(random_.randrange(256) for _ in range(random_.randrange(9)))
        else:
            lines = bytes(data).split(b"\n")
            random_.shuffle(lines) if random_.random() < 0.2 else lines.append(
                lines[random_.randrange(len(lines))]
            )
            data = bytearray(b"\n".join(lines))
    return bytes(data)


def of_values(good: Any, random_: random.Random) -> Any:
    """Values of nested data: put, deleted, doubled, swapped, wrapped."""
    data = copy.deepcopy(good)
    for _ in range(random_.choice((1, 1, 1, 2, 4))):
        places = list(_places(data))
        if not places:
            return random_.choice(ODD)
        home, key = random_.choice(places)
        other, at = random_.choice(places)
        choice = random_.randrange(6)
        if choice <= 1:
            home[key] = random_.choice(ODD)
        elif choice == 2:
            home[key] = copy.deepcopy(other[at])
        elif choice == 3:
            del home[key]
        elif choice == 4:
            home[key] = _deep(home[key], random_.choice((1, 2, 60, 200)))
        elif isinstance(home, dict):
            home[random_.choice([*map(str, ODD[:20]), str(at)])] = home[key]
        else:
            home.append(home[key])
    return data


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(data, (dict, list)):
        for key in list(data) if isinstance(data, dict) else range(len(data)):
            yield data, key
            yield from _places(data[key])


def _deep(value: Any, depth: int) -> Any:
    for i in range(depth):
        value = [value] if i % 2 else {"node": value}
    return value


def _as_yaml(data: Any, random_: random.Random) -> bytes:
    """YAML in blocks, or in braces, which JSON is; what is nested too deep for the former too."""
    try:
        text = json.dumps(data) if random_.random() < 0.3 else yaml.safe_dump(data)
    except RecursionError:
        text = json.dumps(data)
    return text.encode("utf-8", "replace")


# -- kinds of files --------------------------------------------------------------------------------


class Plans:
    def __init__(self, folder: Path):
        self.model = Net()
        self.good = fxprune.plan(fxprune.analyze(self.model, X), rate=0.5).to_json()

    def __call__(self, random_: random.Random) -> bool:
        if random_.random() < 0.4:
            text = of_bytes(self.good.encode(), random_).decode(errors="replace")
        else:
            text = json.dumps(of_values(json.loads(self.good), random_))
        plan = fxprune.Plan.from_json(text)
        pruned = fxprune.apply(self.model, plan, X)  # with its own proof
        assert pruned(X).shape == (2, 3)
        return True


class RuleFiles:
    def __init__(self, folder: Path):
        self.path = folder / "rules.yaml"
        self.good = [path.read_text() for path in sorted((rules.folder() / "ops").glob("*.yaml"))]

    def __call__(self, random_: random.Random) -> bool:
        good = random_.choice(self.good)
        entries = yaml.safe_load(good)
        few = dict(random_.sample(list(entries.items()), min(3, len(entries))))
        if random_.random() < 0.5:
            data = of_bytes(yaml.safe_dump(few, allow_unicode=True).encode(), random_)
        else:
            data = _as_yaml(of_values(few, random_), random_)
        self.path.write_bytes(data)
        found = rules.read(self.path)
        assert all(isinstance(rule, rules.Rule) for rule in found)
        return True


class RecipeFiles:
    def __init__(self, folder: Path):
        self.path, self.model = folder / "recipe.yaml", Net()
        self.good = [path.read_text() for path in (rules.folder() / "recipes").glob("*.yaml")]

    def __call__(self, random_: random.Random) -> bool:
        good = random_.choice(sorted(self.good))
        if random_.random() < 0.5:
            data = of_bytes(good.encode(), random_)
        else:
            data = _as_yaml(of_values(yaml.safe_load(good), random_), random_)
        self.path.write_bytes(data)
        recipe = recipes.find(str(self.path))
        pruned = fxprune.prune(self.model, X, recipe=recipe, verify="shapes")
        assert pruned(X).shape == (2, 3)
        return True


class SavedFiles:
    def __init__(self, folder: Path):
        self.folder = folder
        self.pruned = fxprune.prune(Net(), X, rate=0.5).eval()
        fxprune.save(self.pruned, folder)
        self.good = (folder / saving.WEIGHTS).read_bytes()
        self.tensors = load(self.good)
        size = int.from_bytes(self.good[:8], "little")
        self.header = json.loads(self.good[8 : 8 + size])["__metadata__"]

    def __call__(self, random_: random.Random) -> bool:
        forged = random_.random() < 0.6
        data = self._forged(random_) if forged else of_bytes(self.good, random_)
        (self.folder / saving.WEIGHTS).write_bytes(data)
        found = fxprune.load(self.folder)
        if not forged:
            assert torch.equal(found(X), self.pruned(X))
        return True

    def _forged(self, random_: random.Random) -> bytes:
        header = {k: v for k, v in self.header.items() if k != "fxprune_digest"}
        key = random_.choice(["fxprune_network"] * 6 + list(header))
        if key == "format" or random_.random() < 0.2:
            header[key] = of_bytes(header[key].encode(), random_).decode(errors="replace")
        else:
            header[key] = json.dumps(of_values(json.loads(header[key]), random_))
        digest = saving._digest(header, self.tensors)
        return save(self.tensors, {**header, "fxprune_digest": digest})


KINDS: dict[str, Callable[[Path], Callable[[random.Random], bool]]] = {
    "plan": Plans, "rules": RuleFiles, "recipe": RecipeFiles, "saved": SavedFiles,
}  # fmt: skip


# -- watching --------------------------------------------------------------------------------------


class Watched:
    """Notes what no file may cause, while it is on."""

    EVENTS = (
        "os.system os.exec os.posix_spawn os.remove os.rename subprocess.Popen socket.connect "
        "pickle.find_class ctypes.dlopen shutil.rmtree"
    ).split()

    MAKERS = ("typing", "dataclasses")  # of Python: they evaluate annotations of our own functions

    def __init__(self, folder: Path):
        self.folder, self.on, self.seen = str(folder), False, []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple) -> None:
        if not self.on:
            return
        if event in self.EVENTS:
            self.seen.append(f"{event} {args[:1]}")
        if event == "open" and set(str(args[1])) & set("wax+"):
            own = str(args[0]).startswith(self.folder)
            self.seen += [] if own else [f"open {args[0]} {args[1]}"]
        if event == "exec":  # modules are files; what fx writes of a graph has a name of its own
            file = getattr(args[0], "co_filename", "")
            own = not file.startswith("<") or file.startswith(("<eval_with_key", "<frozen"))
            caller = Path(sys._getframe(1).f_code.co_filename)
            own = own or (caller.parent.name.startswith("python3") and caller.stem in self.MAKERS)
            self.seen += [] if own else [f"exec {file} by {caller}"]


class TooLong(BaseException):
    pass


def _alarm(*args: Any) -> None:
    raise TooLong


def outcome(trial: Callable[[random.Random], bool], seed: int, watched: Watched) -> str:
    """``right``, ``refused``, or what went wrong."""
    watched.seen, watched.on = [], True
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial(random.Random(seed))
        found = "right"
    except fxprune.FxpruneError as error:
        found = "refused" if error.fault and "\n" not in error.fault else f"fault: {error.fault!r}"
    except TooLong:
        found = "too long"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        found = f"{type(error).__name__}: {str(error)[:150]} ({where.filename}:{where.lineno})"
    finally:
        signal.alarm(0)
        watched.on = False
    return f"ran code: {watched.seen[:3]}" if watched.seen else found


def outcomes(kind: str, seeds: range) -> list[tuple[int, str]]:
    """The outcomes of these seeds, in a folder of their own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    signal.signal(signal.SIGALRM, _alarm)
    with tempfile.TemporaryDirectory() as name:
        trial, watched = KINDS[kind](Path(name)), Watched(Path(name))
        for seed in range(5):  # what is loaded at first use
            outcome(trial, seed, watched)
        return [(seed, outcome(trial, seed, watched)) for seed in seeds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--count", type=int, default=10_000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    wrong = 0
    for kind in options.kind or KINDS:
        parts = [
            range(start, min(start + 500, options.seed + options.count))
            for start in range(options.seed, options.seed + options.count, 500)
        ]
        with ProcessPoolExecutor(options.jobs) as pool:
            found = [
                each for part in pool.map(outcomes, [kind] * len(parts), parts) for each in part
            ]
        counts = Counter(what if what in ("right", "refused") else "wrong" for _, what in found)
        print(f"{kind}: {dict(counts)}", flush=True)
        for seed, what in found:
            if what not in ("right", "refused"):
                wrong += 1
                print(f"  seed {seed}: {what}", flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
