"""Recipes: what they give on the networks of their papers, and what a broken file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import models, recipes
from fxprune.errors import OptionError, RecipeError
from fxprune.roles import Roles
from fxprune.yamlfile import folder

torch.set_num_threads(1)


def image(side: int = 32) -> Tensor:
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))


def lively(model: nn.Module) -> nn.Module:
    """Random scales, shifts and statistics, so that masking any of them shows."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1 and tensor.is_floating_point():
            low, high = (0.5, 1.5) if name.endswith(("weight", "var")) else (-0.3, 0.3)
            tensor.uniform_(low, high, generator=generator)
        elif tensor.ndim == 4:
            tensor.mul_(1 / tensor.flatten(1).norm(dim=1).clamp_min(1e-6)[:, None, None, None])
    return model


def left(pruned: Any) -> tuple[int, int]:
    report = pruned.fxprune.report
    return report.params[1], report.macs[1]


# -- the published counts --------------------------------------------------------------------------

# Liu & Lei 2023, Tab. 5: kept expansion channels of the 15 blocks at 50 %
KEPT = (9, 49, 42, 72, 102, 89, 223, 144, 139, 112, 209, 38, 540, 484, 255)


@pytest.mark.parametrize(
    ("classes", "parameters", "flops"),
    [(10, 4_215_130, 230_257_314), (100, 4_330_420, 230_372_604)],
)
def test_dense_mobilenet_costs_what_the_paper_says(classes, parameters, flops):
    found = fxprune.count(models.mobilenet_v3_large(classes), image(224))
    assert (found.parameters, found.slimming) == (parameters, flops)


def expansions(analysis: Any) -> dict[str, int]:
    """Name and width of each expansion, in the order of the network."""
    found = sorted(Roles(analysis).of("expansion"))
    return {analysis.groups[i].name: len(analysis.groups[i]) for i in found}


def test_the_printed_widths_of_mobilenet_give_the_printed_size():
    model, x = models.mobilenet_v3_large(10), image(224)
    wide = expansions(fxprune.analyze(model, x))
    assert sum(KEPT) == 2507 and sum(wide.values()) == 5016
    rates = {name: 1 - k / n for (name, n), k in zip(wide.items(), KEPT, strict=True)}
    options: Any = {"rates": rates, "rate": 0.0, "scope": "local", "select_by": "rate"}
    pruned = fxprune.prune(
        model, x, recipe="mobilenetv3_sparsity_gamma", verify="shapes", **options
    )
    assert left(pruned) == (2_339_846, 129_551_307)
    assert fxprune.count(pruned, x).slimming == 138_069_358
    kept = fxprune.prune(model, x, only=["role:expansion"], verify="shapes", **options)
    assert left(kept) == (2_622_246, 129_833_147), "the squeeze layers as they were"


@pytest.mark.parametrize(
    ("way", "parameters", "macs", "fewer"),
    [
        ("distribution_fit_resnet:A", 646_810, 94_814_848, 62.51),
        ("distribution_fit_resnet:B", 651_202, 95_109_760, 62.39),
        ("distribution_fit_resnet", 651_202, 95_109_760, 62.39),
        ("distribution_fit_resnet:C", 627_476, 95_720_060, 62.15),
    ],
)
def test_three_ways_to_62_percent_of_resnet110(way, parameters, macs, fewer):
    pruned = fxprune.prune(models.resnet110(), image(), recipe=way, verify="shapes")
    assert left(pruned) == (parameters, macs)
    before = pruned.fxprune.report.macs[0]
    assert before == 252_887_680
    assert round(100 * (1 - macs / before), 2) == fewer


def test_the_streams_of_way_c_shrink_together_and_those_of_way_a_not_at_all():
    def widths(way: str) -> list[int]:
        recipe = f"distribution_fit_resnet:{way}"
        state = fxprune.prune(models.resnet20(), image(), recipe=recipe).state_dict()
        names = ("conv1", *(f"layer{k}.1.conv{c}" for k in (1, 2, 3) for c in (1, 2)))
        return [len(state[f"{name}.weight"]) for name in names]

    assert widths("A") == [16, 8, 8, 16, 16, 32, 32]
    assert widths("B") == [16, 6, 16, 12, 32, 24, 64]
    assert widths("C") == [10, 10, 10, 20, 20, 38, 38]


# -- every recipe ----------------------------------------------------------------------------------

HOMES = {
    "mobilenetv3_sparsity_gamma": models.mobilenet_v3_large,
    "mobile_blnet_ratio_sum": models.mobile_blnet,
}


@pytest.mark.parametrize("name", recipes.names())
def test_masked_equals_sliced_for_every_recipe(name):
    model = lively(HOMES.get(name.partition(":")[0], models.resnet20)())
    pruned = fxprune.prune(model, image(), recipe=name)
    report = pruned.fxprune.report
    assert report.verification.difference <= 1e-12
    assert report.verification.elements > 0
    assert report.params[1] < 0.95 * report.params[0]
    assert (pruned.fxprune.plan.recipe, report.recipe) == (name, name)
    assert f"(recipe {name})" in str(report)


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipes_plan_can_be_applied_again(name):
    model = lively(HOMES.get(name.partition(":")[0], models.resnet20)())
    first = fxprune.prune(model, image(), recipe=name, verify=False)
    plan = fxprune.Plan.from_json(first.fxprune.plan.to_json())
    second = fxprune.apply(model, plan, verify="shapes")
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


def test_what_may_go_is_what_the_recipes_say():
    model = models.mobile_blnet()
    pruned = fxprune.prune(model, image(), recipe="mobile_blnet_ratio_sum", verify="shapes")
    changed = {row.name for row in pruned.fxprune.report.groups if row.kept < row.size}
    assert changed and all(name.endswith((".expand.conv", "head.conv")) for name in changed)


def test_explicit_options_win_over_the_recipe():
    plan = fxprune.plan(fxprune.analyze(models.resnet20(), image()), recipe="l1_filters", rate=0.25)
    kept = {group.name: group.kept for group in plan.groups}
    assert kept["layer1.0.conv1"] == 12 and kept["conv1"] == 16
    assert (plan.criterion, plan.rate) == ("l1", 0.25)


def test_an_explicit_rate_takes_the_place_of_the_rates_of_single_layers():
    analysis = fxprune.analyze(models.resnet20(), image())
    plan = fxprune.plan(analysis, recipe="distribution_fit_resnet:C", rate=0.25)
    assert {group.name: group.kept for group in plan.groups}["layer3.1.conv1"] == 48


def test_a_plan_needs_an_analysis_of_the_recipes_kind():
    analysis = fxprune.analyze(models.resnet20(), image())
    with pytest.raises(OptionError, match=r"scatter=True[\s\S]*fxprune.analyze"):
        fxprune.plan(analysis, recipe="fpgm")
    fxprune.plan(fxprune.analyze(models.resnet20(), image(), scatter=True), recipe="fpgm")


def test_recipes_are_read_once_and_cannot_be_changed():
    found = recipes.find("network_slimming")
    assert found is recipes.find("network_slimming")
    with pytest.raises(Exception, match="frozen"):
        found.rate = 0.1
    assert found.sparse.s == 1e-4 and found.sparse.all_bn
    assert fxprune.prune(models.resnet20(), image(), recipe=found, verify=False)


SHIPPED = sorted((folder() / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_name_their_source_and_what_is_ours(path):
    found = recipes.read(path)
    assert found.name == path.stem
    assert found.about and found.source and found.ours
    assert found.fine_tune is not None


# -- files of one's own ----------------------------------------------------------------------------


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_file_of_ones_own_works_like_a_name(tmp_path):
    path = write(
        tmp_path,
        """
about: half of the inner channels
criterion: {name: sparsity, side: below}
only: ["role:inner"]
rate: 0.5
fine_tune: {epochs: 3, lr: 0.01, optimizer: adamw}
variants:
  gentle: {rate: 0.25}
  2: {criterion: l1}
""",
    )
    analysis = fxprune.analyze(models.resnet20(), image())

    def kept(recipe: Any) -> tuple[str, int]:
        plan = fxprune.plan(analysis, recipe=recipe)
        (row,) = (group for group in plan.groups if group.name == "layer1.0.conv1")
        return plan.criterion, row.kept

    assert kept(path) == ("sparsity(side=below)", 8)
    assert kept(str(path)) == ("sparsity(side=below)", 8)
    assert kept(f"{path}:gentle") == ("sparsity(side=below)", 12)
    assert kept(f"{path}:2") == ("l1", 8)
    assert recipes.find(path).fine_tune.optimizer == "adamw"


def test_merged_fields_may_be_changed(tmp_path):
    text = """
train: &slow {epochs: 10, lr: 0.1}
fine_tune: {<<: *slow, lr: 0.01}
only: role:inner
"""
    found = recipes.find(write(tmp_path, text))
    assert (found.train.lr, found.fine_tune.lr, found.fine_tune.epochs) == (0.1, 0.01, 10)
    assert found.only == ["role:inner"]


def test_files_of_one_name_are_two_recipes(tmp_path, monkeypatch):
    import os

    for name, rate in (("a", 0.1), ("b", 0.9)):
        (tmp_path / name).mkdir()
        path = write(tmp_path / name, f"rate: {rate}")
        os.utime(path, (1, 1))
        monkeypatch.chdir(tmp_path / name)
        assert recipes.find("mine.yaml").rate == rate


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "a\0b.yaml", "", ":", "x" * 300 + ".yaml"])
def test_what_can_be_no_file(name):
    with pytest.raises(RecipeError):
        recipes.find(name)


def test_a_recipe_that_does_not_fit_says_which_and_what_there_is():
    with pytest.raises(OptionError) as caught:
        fxprune.prune(models.resnet20(), image(), recipe="mobilenetv3_sparsity_gamma")
    message = str(caught.value)
    assert "`role:expansion` matches nothing" in message
    assert "stream (3), inner (9)" in message and "mobilenetv3_sparsity_gamma" in message


def test_a_recipe_without_a_name_needs_its_analysis_too():
    analysis = fxprune.analyze(models.resnet20(), image())
    with pytest.raises(OptionError, match="scatter=True"):
        fxprune.plan(analysis, recipe=recipes.Recipe(scatter=True))


def test_squeeze_can_be_switched_off():
    model = models.mobilenet_v3_large()
    name = "mobilenetv3_sparsity_gamma"
    options: Any = {"recipe": name, "verify": "shapes", "criterion": "random"}
    kept = fxprune.prune(model, image(64), squeeze=False, **options)
    rebuilt = fxprune.prune(model, image(64), **options)
    assert kept.get_submodule("features.15.block.2.fc1").out_channels == 240
    assert rebuilt.get_submodule("features.15.block.2.fc1").out_channels < 240


def test_a_threshold_among_equal_scores_is_a_warning():
    report = fxprune.prune(models.resnet20(), image(), recipe="network_slimming").fxprune.report
    assert "scores are not above the threshold" in str(report)
    assert "(global, threshold)" in str(report)
    lively_one = fxprune.prune(lively(models.resnet20()), image(), recipe="network_slimming")
    assert not lively_one.fxprune.report.warnings


def test_a_file_that_was_changed_is_read_again(tmp_path):
    path = write(tmp_path, "rate: 0.25")
    assert recipes.find(path).rate == 0.25
    path.write_text("rate: 0.75\n# longer than before")
    assert recipes.find(path).rate == 0.75


BROKEN = [
    ("criterion: l1\nrat: 0.5", ":2 `rat`", "did you mean `rate`?"),
    ("criterion: l3", ":1 `criterion`: no criterion `l3`", "did you mean `l"),
    ("rate: 0.5\ncriterion: {name: sparsity, sid: above}", ":2 `criterion`", "`side`"),
    ("criterion: {name: sparsity, side: over}", "side='over'", ""),
    ("rate: 1.5", ":1 `rate`", ""),
    ("rate: half", ":1 `rate`", ""),
    ("scope: globl", ":1 `scope`", ""),
    ("about: x\nsparse:\n  s: 0.1\n  lamda: 2", ":4 `sparse.lamda`", ""),
    ("sparse: {warmup: 10}", "`sparse.s`", ""),
    ("fine_tune:\n  epochs: 3\n  lr: 0.1\n  shedule: step", ":4 `fine_tune.shedule`", "`schedule`"),
    ("rates:\n  conv1: 0.5\n  conv2: 2.0", "the rate of `conv2` is 2", ""),
    ("squeeze: {devide: 4}", ":1 `squeeze`: squeeze has no `devide`", "`divide`"),
    ("rate: 0.5\nrate: 0.6", ":2 `rate` stands twice", ""),
    ("variants:\n  A:\n    rate: 7", ":3 `rate`", ""),
    ("variants:\n  A: 3", ":1 variants must map", ""),
    ("- l1\n- l2", ":1 must hold the fields", ""),
    ("", ":1 must hold the fields", ""),
    ("criterion: [l1", "is not YAML", ""),
    ("only: 3", ":1 `only`", ""),
    ("about: &a [*a]", ":1", ""),
    ("about: &a {b: *a}", ":1", ""),
    ("rate: !!bool maybe", "is not YAML", ""),
    ("rate: !!int ''", "is not YAML", ""),
    ("about: !!timestamp foo", "is not YAML", ""),
    ("sparse: {s: 1e-4}", "`sparse.s`", "write 1.0e-4 for 1e-4"),
    ("sparse: {s: .inf}", "`sparse.s`", ""),
    ("fine_tune: {epochs: 2, lr: 0.1, milestones: [0.5, 3]}", "`fine_tune.milestones.1`", ""),
    ("variants: []", ":1 variants must map", ""),
    ("variants: {'': {rate: 0.1}}", ":1 variants must map", ""),
    ("variants:\n  A: {rate: 0.1,\n      name: B}", ":3 `name` cannot be changed", ""),
    ("variants:\n  A:\n    rate: 7\nrate: 0.5", ":3 `rate`", ""),
    ("variants:\n  A:\n    sparse:\n      s: -1\nsparse:\n  s: 0.1", ":4 `sparse.s`", ""),
]


@pytest.mark.parametrize(("text", "fault", "hint"), BROKEN)
def test_a_broken_file_says_where_and_what_was_meant(tmp_path, text, fault, hint):
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        recipes.find(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and fault in message
    assert hint in message.partition("hint:")[2]


def test_what_is_not_there_is_named_with_the_nearest_name(tmp_path):
    with pytest.raises(RecipeError, match=r"did you mean `network_slimming`\?"):
        fxprune.prune(models.resnet20(), image(), recipe="network_sliming")
    with pytest.raises(RecipeError, match="has no variant `D`"):
        recipes.find("distribution_fit_resnet:D")
    with pytest.raises(RecipeError, match="cannot be read"):
        recipes.find(tmp_path / "nowhere.yaml")
    with pytest.raises(RecipeError, match="recipe is a int"):
        recipes.find(3)  # type: ignore[arg-type]
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"about: \xe9")
    with pytest.raises(RecipeError, match="not UTF-8"):
        recipes.find(latin)


def test_a_pattern_that_matches_nothing_is_refused(tmp_path):
    path = write(tmp_path, 'only: ["layer9.*"]')
    with pytest.raises(OptionError, match=r"only pattern `layer9.\*` matches nothing"):
        fxprune.prune(models.resnet20(), image(), recipe=path)
