"""The training example: three systems from start to end, stopped and resumed, on two processes."""

from __future__ import annotations

import copy
import gzip
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fxprune
from fxprune import models, recipes

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPT = EXAMPLES / "train_prune_finetune.py"
QUICK = ["--batch", 32, "--device", "cpu", "--latency-batch", 2, "--latency-rounds", 3]


@pytest.fixture(scope="module")
def example():
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("train_prune_finetune")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """96 + 40 images of 8x8 pixels in three classes, which a network can tell apart."""
    draw, file = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "blobs.npz"
    y_train, y_test = np.arange(96) % 3, np.arange(40) % 3
    x = [draw.integers(0, 120, (len(y), 8, 8, 3), np.uint8) for y in (y_train, y_test)]
    for pictures, labels in zip(x, (y_train, y_test), strict=True):
        pictures[np.arange(len(labels)), :, :, labels] += 100
    np.savez(file, x_train=x[0], y_train=y_train, x_test=x[1], y_test=y_test)
    return file


def _run(example, *argv: object) -> dict:
    """What a call of the script wrote into results.json."""
    arguments = [*map(str, (*argv, *QUICK))]
    example.main(arguments)
    return _results(Path(arguments[arguments.index("--output") + 1]))


def _results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def _measured(results: dict) -> list[dict]:
    """All runs but for their times, which no two runs share."""
    return [{k: v for k, v in r.items() if not k.endswith("ms")} for r in results["runs"]]


# -- the three systems -----------------------------------------------------------------------------

SYSTEMS = {
    "mobilenetv3": (["--rates", 0.5], 4_215_130),
    "distfit": (["--rates", 0.5, "--seeds", 2], 269_722),
    "blnet": (["--recipes", "mobile_blnet_ratio_sum", "network_slimming", "--size", 16], 334_770),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_trains_prunes_and_fine_tunes(example, tmp_path, system):
    """A few steps on digits: every row is there, smaller than the dense network, and its files
    make the network that was measured."""
    options, size = SYSTEMS[system]
    found = _run(example, system, *options, "--steps", 2, "--output", tmp_path)
    rows = found["rows"]
    args = example.arguments([system, *map(str, options)])
    wanted = [recipe for recipe in args.recipes for _ in (*args.rates, *args.macs)]
    assert [row["recipe"] for row in rows] == ["", *wanted]
    assert rows[0]["parameters"] == size
    for row in rows[1:]:
        assert row["macs"] < rows[0]["macs"] and row["parameters"] < size
        assert 0 < row["after"] < 1 and row["ms"] > 0
    assert found["about"]["torch"] == torch.__version__
    _check_tables(tmp_path, rows)
    _check_files(example, args, tmp_path, found)


def _check_tables(folder: Path, rows: list[dict]) -> None:
    text = (folder / "results.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == len(rows) + 2
    for line, row in zip(lines[3:], rows[1:], strict=True):
        assert line.startswith(f"| {row['recipe']} |") and f"{row['parameters']:,.0f} (-" in line
    assert "dense, fine-tuned alike" in lines[2] and "paper: " in lines[0]
    assert (folder / "results.png").exists() == bool(importlib.util.find_spec("matplotlib"))


def _check_files(example, args, folder: Path, found: dict) -> None:
    """The last row's plan and weights give its accuracy again."""
    run, data = found["runs"][-1], example.load(args.data, None, size=args.size)
    files = folder / f"seed{run['seed']}"
    dense = example.SYSTEMS[args.system].build(args, data.classes)
    dense.load_state_dict(load_file(files / "trained.safetensors"))
    name = example.Variant(run["recipe"], *_asked(run["asked"])).file
    plan = fxprune.Plan.from_json((files / f"{name}.plan.json").read_text())
    model = fxprune.apply(dense, plan, verify=False)
    model.load_state_dict(load_file(files / f"{name}.safetensors"))
    place = example.Place(torch.device("cpu"))
    assert example.accuracy(model, data, place) == run["after"]
    assert not list(folder.rglob("*.checkpoint")) and not list(folder.rglob("*.part"))


def _asked(text: str) -> tuple[float | None, float | None]:
    number = float(re.search(r"[\d.]+", text)[0])
    return (None, number) if "MACs" in text else (number, None)


def test_the_papers_figures_stand_beside_their_own_rows_only(example):
    """At 50 % Liu & Lei state 88.55 % on CIFAR-10 and 61.22 % on CIFAR-100; at 45 % nothing."""

    def theirs(system: str, recipe: str, rate: float, data: str = "cifar10"):
        line = example.Line([{"recipe": recipe, "rate": rate}], [])
        return example.SYSTEMS[system].figures(line, data)

    own = "mobilenetv3_sparsity_gamma"
    assert theirs("mobilenetv3", own, 0.5)["accuracy, %"] == "88.55"
    assert theirs("mobilenetv3", own, 0.5, "cifar100")["accuracy, %"] == "61.22"
    assert theirs("mobilenetv3", "", 0.0)["slimming FLOPs"] == "230.0 M"
    assert theirs("mobilenetv3", own, 0.45) == theirs("mobilenetv3", "l1_filters", 0.5) == {}
    assert theirs("blnet", "mobile_blnet_ratio_sum:share", 0.3, "food101")["MACs"] == "203.0 M"
    assert theirs("blnet", "network_slimming", 0.3) == theirs("distfit", "fpgm", 0.5) == {}


def test_equal_macs_means_that_every_recipe_has_its_own_rate(example, tmp_path):
    options = ["--recipes", "l1_filters", "fpgm", "--macs", 0.4, "--steps", 1]
    rows = _run(example, "distfit", *options, "--output", tmp_path)["rows"]
    for row in rows[1:]:
        assert 0.36 < row["macs"] / rows[0]["macs"] <= 0.4
    assert rows[1]["rates"] != rows[2]["rates"]


def test_the_rate_for_a_share_of_the_macs_is_the_lowest(example):
    torch.manual_seed(0)
    model, x = models.resnet20(), torch.zeros(2, 3, 8, 8)
    dense = fxprune.analyze(model, x).macs()
    rate = example.rate_for(model, x, "l1_filters", 0.5)
    left = [
        fxprune.prune(model, x, recipe="l1_filters", rate=r, verify=False).fxprune.report.macs[1]
        for r in (rate, rate - 2**-10)
    ]
    assert left[0] <= 0.5 * dense < left[1]


# -- stopped and resumed ---------------------------------------------------------------------------

LONG = ["--recipes", "l1_filters", "--rates", 0.3, 0.6, "--epochs", 4, "--fine-tune-epochs", 2]
EPOCHS = 4 + 3 * 2


@pytest.fixture(scope="module")
def whole(example, images, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("whole")
    return _run(example, "distfit", "--data", images, *LONG, "--output", folder)


def test_the_same_command_gives_the_same_numbers(example, images, whole, tmp_path):
    again = _run(example, "distfit", "--data", images, *LONG, "--output", tmp_path)
    assert _measured(again) == _measured(whole)


@pytest.mark.parametrize("stop", [2, 4, 7, 9])
def test_a_run_that_was_stopped_goes_on(example, images, whole, tmp_path, monkeypatch, stop):
    """Stopped in the first training, between stages, and within fine-tunings: what was done is not
    done again, and all ends as if nothing had happened."""
    command = ["distfit", "--data", images, *LONG, "--output", tmp_path]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _count_epochs(example, patch, stop)
        _run(example, *command)
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.safetensors")}
    assert len(before) == (0 if stop <= 4 else 1 + (stop - 5) // 2)
    with monkeypatch.context() as patch:
        epochs = _count_epochs(example, patch, None)
        assert _measured(_run(example, *command)) == _measured(whole)
    assert len(epochs) == EPOCHS - stop
    assert before == {f: f.stat().st_mtime_ns for f in before}


def _count_epochs(example, patch: pytest.MonkeyPatch, stop: int | None) -> list[int]:
    """Collects an item an epoch; after `stop` of them, and their checkpoint, all ends."""
    done: list[int] = []
    save = example.Trainer.save

    def counted(trainer, file):
        save(trainer, file)
        done.append(trainer.epoch)
        if len(done) == stop:
            raise KeyboardInterrupt

    patch.setattr(example.Trainer, "save", counted)
    return done


def test_a_finished_run_only_shows_its_table(example, images, tmp_path, monkeypatch, capsys):
    command = ["distfit", "--data", images, *LONG, "--steps", 1, "--output", tmp_path]
    first = _run(example, *command)
    capsys.readouterr()
    monkeypatch.setattr(example, "Trainer", None)
    assert _run(example, *command) == first
    assert "l1_filters" in capsys.readouterr().out


def test_a_folder_of_another_training_is_refused(example, images, tmp_path):
    command = ["distfit", "--data", images, *LONG, "--steps", 1, "--output", tmp_path]
    _run(example, *command)
    with pytest.raises(SystemExit, match="another train, fine_tune"):
        _run(example, *command, "--epochs", 5, "--fine-tune-epochs", 1)
    more = _run(example, *command, "--rates", 0.3, 0.5)  # another row is no other training
    assert [row["asked"] for row in more["rows"]] == ["", "rate 0.3", "rate 0.5"]


def _settings(example, images, *argv: str) -> dict:
    args = example.arguments(argv)
    data, place = example.load(str(images), None, size=8), example.Place(torch.device("cpu"))
    return example.Experiment(args, example.SYSTEMS[args.system], data, place, None).settings()


def test_training_is_the_recipes_but_for_what_is_given(example, images):
    own = recipes.find("mobilenetv3_sparsity_gamma")
    plain = _settings(example, images, "mobilenetv3")
    assert plain["train"] == own.train.model_dump(mode="json")
    assert plain["fine_tune"] == own.fine_tune.model_dump(mode="json")
    assert plain["sparse"] == own.sparse.model_dump(mode="json")
    given = _settings(example, images, "mobilenetv3", "--lr", "0.3", "--sparsity", "0.5")
    assert given["train"] == {**plain["train"], "lr": 0.3}
    assert given["fine_tune"] == plain["fine_tune"]
    assert given["sparse"] == {**plain["sparse"], "s": 0.5}
    assert _settings(example, images, "mobilenetv3", "--sparsity", "0")["sparse"] is None
    assert _settings(example, images, "distfit")["sparse"] is None
    assert _settings(example, images, "distfit", "--sparsity", "0.1")["sparse"]["s"] == 0.1


def test_a_recipe_that_is_not_there_is_found_before_the_training(example, images):
    with pytest.raises(fxprune.errors.RecipeError, match="no recipe `fgpm`"):
        _settings(example, images, "distfit", "--recipes", "l1_filters", "fgpm")


MINE = "criterion: l2\nonly: ['role:inner']\nvariants:\n  other: {round_to: 2}\n"


@pytest.mark.parametrize(
    ("before", "after", "refused"),
    [
        ("l2", "random", True),
        ("role:inner", "*", True),
        ("round_to: 2", "round_to: 4", False),  # of a variant that has no row
        ("criterion", "about: mine\ncriterion", False),
    ],
)
def test_rows_of_an_edited_recipe_are_refused(example, images, tmp_path, before, after, refused):
    recipe, output = tmp_path / "mine.yaml", tmp_path / "out"
    recipe.write_text(MINE)
    command = ["distfit", "--data", images, "--recipes", recipe, "--rates", 0.5, "--steps", 1]
    first = _run(example, *command, "--output", output)
    recipe.write_text(MINE.replace(before, after))
    os.utime(recipe, (1, 1))  # two edits within a tick of the clock
    if refused:
        with pytest.raises(SystemExit, match=r"another version of recipe .*mine.yaml; choose"):
            _run(example, *command, "--output", output)
    else:
        assert _run(example, *command, "--output", output) == first


def test_a_row_that_was_stopped_is_not_finished_by_an_edited_recipe(
    example, images, tmp_path, monkeypatch
):
    """Its checkpoint is of other channels."""
    recipe, output = tmp_path / "mine.yaml", tmp_path / "out"
    recipe.write_text(MINE)
    options = ["--recipes", recipe, "--rates", 0.5, "--epochs", 1, "--fine-tune-epochs", 2]
    command = ["distfit", "--data", images, *options, "--output", output]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _count_epochs(example, patch, 1 + 2 + 1)
        _run(example, *command)
    assert list(output.rglob("*rate-0.5.checkpoint"))
    recipe.write_text(MINE.replace("l2", "random"))
    os.utime(recipe, (1, 1))
    with pytest.raises(SystemExit, match="another version of recipe"):
        _run(example, *command)


# -- what is wrong is said at once -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[(f"--{name}", value) for name in ("epochs", "steps") for value in ("0", "-2")],
        *[("--fine-tune-epochs", "0"), ("--batch", "0"), ("--seeds", "0"), ("--size", "-8")],
        *[("--threads", "-1"), ("--latency-rounds", "0"), ("--latency-batch", "0")],
        *[("--workers", "-1"), ("--seeds", "1.5"), ("--seeds", "two")],
        *[("--lr", value) for value in ("-1", "0", "nan", "inf", "fast")],
        *[("--fine-tune-lr", "0"), ("--sparsity", "-1"), ("--sparsity", "inf")],
        *[("--rates", "0"), ("--rates", "1"), ("--macs", "1.5"), ("--macs", "nan")],
    ],
)
def test_numbers_out_of_range_are_refused(example, capsys, option, value):
    with pytest.raises(SystemExit) as error:
        example.main(["distfit", option, value])
    said = capsys.readouterr().err
    assert error.value.code == 2 and f"argument {option}: {value} is not a" in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--recipes", "fgpm"], "no recipe `fgpm`"),
        (["--recipes", "distribution_fit_resnet:D"], "no variant `D`"),
        (["--training", "fgpm"], "no recipe `fgpm`"),
        (["--device", "foo"], "--device foo cannot be used"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--device", "meta"], "--device meta cannot be used"),
        (["--output", "FILE"], "FILE"),
        (["--output", "FILE/sub"], "FILE"),
        (["--output", "BROKEN"], "settings.json is broken"),
        (["--output", "LIST"], "settings.json is broken"),
        (["--recipes", "mobilenetv3_sparsity_gamma"], "`role:expansion` matches nothing"),
        (["--recipes", "l1_filters", "fpgm", "--macs", "0.5", "0.001"], "0.001 of its MACs"),
    ],
)
def test_what_cannot_work_is_said_before_any_training(
    example, images, tmp_path, monkeypatch, options, says
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(example, "Trainer", None)
    Path("FILE").touch()
    for name, text in (("BROKEN", "{"), ("LIST", "[]")):
        Path(name).mkdir()
        Path(name, "settings.json").write_text(text)
    with pytest.raises(SystemExit) as error:
        example.main(["distfit", "--data", str(images), *options])
    assert says in str(error.value.code)


def test_errors_of_the_program_itself_are_not_hidden(example, images, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "Trainer", None)
    with pytest.raises(TypeError):
        _run(example, "distfit", "--data", images, "--output", tmp_path)


def test_a_folder_that_may_not_be_written_is_said(example, images, tmp_path, monkeypatch):
    def fails(*_):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(example, "write_text", fails)
    with pytest.raises(SystemExit, match="Permission denied"):
        _run(example, "distfit", "--data", images, "--output", tmp_path)


SHIPPED = [(system, "l1_filters") for system in SYSTEMS] + [
    ("mobilenetv3", "mobilenetv3_sparsity_gamma"),
    ("blnet", "mobile_blnet_ratio_sum"),
    ("blnet", "mobile_blnet_ratio_sum:share"),
    ("blnet", "network_slimming"),
    ("distfit", "distribution_fit_resnet:B"),
]


@pytest.mark.parametrize(("system", "recipe"), SHIPPED)
def test_an_untrained_network_does_not_rule_out_what_a_trained_one_reaches(example, system, recipe):
    """Its scales are all alike, those here are not; a little more than the least of this network
    is let through with that one."""
    torch.manual_seed(0)
    model = example.SYSTEMS[system].build(example.arguments([system, "--size", "32"]), 10)
    x, trained = torch.zeros(2, 3, 32, 32), copy.deepcopy(model)
    for norm in _norms(trained):
        torch.nn.init.uniform_(norm.weight)
    analysis = example.analysis_for(trained, x, recipe)
    least = example.share_left(analysis, recipe, 1 - 2**-10)
    example.check_fits(model, x, recipe, (0.5,), (1.02 * least,))
    assert least < 0.5


def test_an_interrupted_write_leaves_the_old_file(example, tmp_path):
    file = tmp_path / "a.json"
    example.write(file, lambda temporary: temporary.write_text("old"))

    def fails(temporary):
        temporary.write_text("ne")
        raise OSError("no space left")

    with pytest.raises(OSError):
        example.write(file, fails)
    assert file.read_text() == "old"


# -- the loop --------------------------------------------------------------------------------------


def _trainer(example, images, **options):
    """A small training, and its model."""
    torch.manual_seed(0)
    model, data = models.resnet20(num_classes=3), example.load(str(images), None, size=8)
    how = recipes.find("network_slimming").train.model_copy(
        update={"batch": 32, "epochs": 8, "lr": 0.05, "schedule": "cosine"}
    )
    device, amp = torch.device("cpu"), options.pop("amp", False)
    place = example.Place(device, world=options.pop("world", 1), amp=amp)
    return example.Trainer(model, data, how, place, **options), data, place


@pytest.mark.parametrize("amp", [False, True])
def test_training_learns(example, images, amp, tmp_path):
    trainer, data, place = _trainer(example, images, amp=amp)
    before = example.accuracy(trainer.model, data, place)
    example.fit(trainer, tmp_path / "checkpoint", lambda: None)
    assert before < 0.7 and example.accuracy(trainer.model, data, place) > 0.9


def test_sparse_training_shrinks_scales(example, images, tmp_path):
    """The same training with and without the L1 term."""
    totals = {}
    for s in (None, 0.1):
        sparse = s and recipes.find("network_slimming").sparse.model_copy(update={"s": s})
        trainer, _, _ = _trainer(example, images, sparse=sparse)
        example.fit(trainer, tmp_path / f"{s}", lambda: None)
        totals[s] = sum(float(m.weight.detach().abs().sum()) for m in _norms(trainer.model))
    assert totals[0.1] < 0.9 * totals[None]


def _norms(model):
    return [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]


def test_statistics_keep_up_with_short_trainings_only(example):
    """MobileNetV3's momentum is 0.01: a hundredth of a batch's statistics a step."""
    loop = importlib.import_module("training.loop")
    for steps, momentum in ((50, 0.1), (400, 0.05), (100_000, 0.01)):
        model = models.mobilenet_v3_large()
        loop.keep_up(model, steps)
        assert {m.momentum for m in _norms(model)} == {momentum}


def test_a_loss_that_is_no_number_ends_the_training(example, images, tmp_path):
    trainer, _, _ = _trainer(example, images)
    trainer.how = trainer.how.model_copy(update={"lr": 1e30})
    with pytest.raises(SystemExit, match="lower --lr"):
        example.fit(trainer, tmp_path / "checkpoint", lambda: None)


def _torchs(optimizer, schedule: str, steps: int):
    from torch.optim import lr_scheduler as torchs

    if schedule == "step":
        return torchs.MultiStepLR(optimizer, [steps // 2, steps * 3 // 4], 0.2)
    if schedule == "cosine":
        return torchs.CosineAnnealingLR(optimizer, steps)
    return torchs.OneCycleLR(optimizer, 0.1, total_steps=steps + 1, final_div_factor=1e9)


@pytest.mark.parametrize("schedule", ["step", "cosine", "one_cycle"])
def test_schedules_are_torchs(example, schedule):
    loop = importlib.import_module("training.loop")
    how = recipes.find("network_slimming").train.model_copy(
        update={"schedule": schedule, "milestones": (0.5, 0.75), "gamma": 0.2}
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)
    theirs = _torchs(optimizer, schedule, 200)
    for step in range(200):
        assert 0.1 * loop.factor(how, step / 200) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=0.03, abs=1e-4
        )
        optimizer.step()
        theirs.step()


def test_a_batch_is_dealt_evenly(example, images):
    with pytest.raises(SystemExit, match="32 cannot be dealt to 3"):
        _trainer(example, images, world=3)


def test_every_image_is_in_one_process_once_an_epoch(example, images):
    """Two processes together see what one sees, in the same batches."""
    alone, _, place = _trainer(example, images)
    two = []
    for rank in (0, 1):
        trainer, _, _ = _trainer(example, images)
        trainer.place = type(place)(place.device, rank, 2)
        two.append(trainer.indices(3))
    for whole, *parts in zip(alone.indices(3), *two, strict=True):
        assert sorted(whole.tolist()) == sorted(torch.cat(parts).tolist())
    assert sorted(torch.cat(alone.indices(3)).tolist()) == list(range(96))
    assert not torch.equal(alone.indices(3)[0], alone.indices(4)[0])


def test_two_processes_train_one_network(example, images, tmp_path):
    """Under torchrun; the accuracy that both measured together is that of the one network that the
    files hold."""
    options = ["--data", images, "--recipes", "l1_filters", "--rates", 0.5, "--steps", 4]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(SCRIPT), "distfit", *options, *QUICK, "--threads", 1, "--output", tmp_path]
    path = os.pathsep.join(filter(None, [str(EXAMPLES.parent), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = _results(tmp_path)
    assert found["about"]["processes"] == 2 and done.stdout.count("ResNet-20 on blobs") == 1
    assert [row["recipe"] for row in found["rows"]] == ["", "l1_filters"]
    _check_files(example, example.arguments(["distfit", "--data", str(images)]), tmp_path, found)


# -- images ----------------------------------------------------------------------------------------


def test_augmented_images_are_windows_of_padded_ones(example):
    data = importlib.import_module("training.data")
    x = torch.randint(0, 256, (32, 3, 16, 16), dtype=torch.uint8)
    moved = data.augmented(x, torch.Generator().manual_seed(0), mirror=True)
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    for before, after in zip(padded, moved, strict=True):
        windows = [before[:, i : i + 16, j : j + 16] for i in range(5) for j in range(5)]
        assert any(torch.equal(after, w) or torch.equal(after, w.flip(2)) for w in windows)
    unmoved = data.augmented(x[..., :4, :4], torch.Generator(), mirror=False)
    assert torch.equal(unmoved, x[..., :4, :4])


def test_images_are_normalised_by_the_training_images(example, images):
    data = example.load(str(images), None, size=8)
    every = data.ready(data.train.x)
    assert every.mean((0, 2, 3)).abs().max() < 1e-3
    assert (every.std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert data.classes == 3 and data.name == "blobs"
    assert example.load(str(images), None, size=32).ready(data.test.x).shape == (40, 3, 32, 32)


def test_fashion_images_are_read_from_gz_files(example, tmp_path):
    draw, written = np.random.default_rng(0), {}
    for split, count in (("train", 7), ("t10k", 3)):
        x, y = draw.integers(0, 256, (count, 28, 28), np.uint8), np.arange(count, dtype=np.uint8)
        written[split] = x
        for kind, array in (("images-idx3", x), ("labels-idx1", y)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            file = tmp_path / f"{split}-{kind}-ubyte.gz"
            file.write_bytes(gzip.compress(head + array.tobytes()))
    data = example.load("fashion", tmp_path, size=32)
    assert (data.train.x[:, 1].numpy() == written["train"]).all()
    assert data.test.y.tolist() == [0, 1, 2] and data.classes == 7
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(SystemExit, match="--download"):
        example.load("fashion", tmp_path, size=32)


@pytest.mark.parametrize(
    ("inside", "name"),
    [
        ("cifar-10-batches-py", "cifar10"),
        ("cifar-100-python", "cifar100"),
        ("food-101", "food101"),
        ("FashionMNIST", "fashion"),
        ("train-images-idx3-ubyte.gz", "fashion"),
    ],
)
def test_a_folder_is_known_by_what_lies_in_it(example, tmp_path, inside, name):
    (tmp_path / inside).mkdir()
    args = example.arguments(["distfit", "--data", str(tmp_path)])
    assert (args.data, args.data_dir) == (name, tmp_path)


def test_a_folder_of_no_data_set_or_of_two_is_refused(example, tmp_path):
    with pytest.raises(SystemExit, match="no data set that is known"):
        example.arguments(["distfit", "--data", str(tmp_path)])
    for inside in ("cifar-10-batches-py", "food-101"):
        (tmp_path / inside).mkdir()
    with pytest.raises(SystemExit, match="cifar10 and food101: name it"):
        example.arguments(["distfit", "--data", str(tmp_path)])


def test_cifar_images_are_torchvisions(example, tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")

    class Stored:
        def __init__(self, root, train, download):
            self.data = np.full((6 if train else 3, 32, 32, 3), 9, np.uint8)
            self.targets = [*range(len(self.data))]

    monkeypatch.setattr(datasets, "CIFAR10", Stored)
    data = example.load("cifar10", tmp_path, size=32)
    assert data.train.x.shape == (6, 3, 32, 32) and data.train.mirror
    assert data.test.y.tolist() == [0, 1, 2] and data.classes == 6


def test_food_images_are_cut_to_size(example, tmp_path):
    """Two photographs in torchvision's layout."""
    pytest.importorskip("torchvision")
    root = tmp_path / "food-101"
    (root / "meta").mkdir(parents=True)
    for split in ("train", "test"):
        (root / "meta" / f"{split}.json").write_text(json.dumps({"pie": [f"pie/{split}"]}))
        (root / "images" / "pie").mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
        Image.fromarray(noise).save(root / "images" / "pie" / f"{split}.jpg")
    data = example.load("food101", tmp_path, size=224, workers=0)
    noise = torch.Generator().manual_seed(0)
    for split in (data.train, data.test):
        (batch,) = data.batches(split, [torch.tensor([0])], torch.device("cpu"), noise)
        assert batch[0].shape == (1, 3, 224, 224) and batch[0].dtype == torch.float32
        assert batch[1].tolist() == [0]


@pytest.mark.parametrize(
    "name, folder, says",
    [
        ("cifar10", None, "needs --data-dir"),
        ("cifar10", "empty", "--download"),
        ("food101", "empty", "--download"),
        ("mnist", None, "known are digits, cifar10"),
        ("none.npz", None, "there is no none.npz"),
    ],
)
def test_data_that_is_not_there_says_what_to_do(example, tmp_path, name, folder, says):
    with pytest.raises(SystemExit, match=says):
        example.load(name, folder and tmp_path / folder, size=32)


def test_archives_of_other_arrays_are_refused(example, tmp_path):
    file, y = tmp_path / "a.npz", np.zeros(4, int)
    np.savez(file, x_train=np.zeros((4, 8, 8, 3)), y_train=y, x_test=y)
    with pytest.raises(SystemExit, match="has no y_test"):
        example.load(str(file), None, size=8)
    np.savez(file, x_train=np.zeros((4, 8, 8, 3)), y_train=y, x_test=y, y_test=y)
    with pytest.raises(SystemExit, match="uint8"):
        example.load(str(file), None, size=8)
