"""``fxprune verify``: does a pruned network still compute the masked original?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import NamingError, OptionError, VerificationError
from ..rendered import verified
from . import tables
from .command import Answer, command, of_file, option
from .options import Named
from .output import Output

if TYPE_CHECKING:
    from ..plans import Plan
    from ..verifier import Verification

_FITTED = (
    "the weights were fitted after pruning; the plan, applied to the model anew, gives the masked "
    "original"
)


@dataclass
class Against:
    """What is compared with the model."""

    folder: Annotated[
        Path | None,
        typer.Argument(
            help="The folder that prune -o wrote.", metavar="FOLDER", show_default=False
        ),
    ] = None
    plan: Annotated[
        Path | None,
        option(
            help="A plan: apply it to the model, and verify the result.",
            default="none",
            metavar="FILE",
        ),
    ] = None


def register(app: typer.Typer, panel: str) -> None:
    command(
        app,
        panel=panel,
        examples=[
            "fxprune verify torchvision:resnet18 small/",
            "fxprune verify net.py:Net --plan plan.json",
        ],
    )(verify)


def verify(named: Named, against: Against, output: Output) -> Answer:
    """Prove that a pruned network computes what the original does with the channels masked.

    The model must be the one that was pruned, with the weights it had then: the same --weights, or
    the same --seed. A network that was trained after pruning computes something else. Of one that
    was fitted by --compensate its shapes and its plan are proven, and its numbers not compared.
    """
    if (against.folder is None) == (against.plan is None):
        raise OptionError("verify takes a folder or --plan", hint="one of the two")
    text = "" if against.plan is None else _text(against.plan)
    model = named.load(output)
    output.steps.at("verify")
    if against.folder is not None:
        plan, found = _saved(model, against.folder, named.example())
    else:
        plan, found = _planned(model, text, named.example())
    data = {"verification": asdict(found), "plan": _described(plan)}
    return Answer(data, [tables.line(verified(found))])


def _planned(model: Any, text: str, example: Any) -> tuple[Plan, Any]:
    import fxprune

    with of_file():
        plan = fxprune.Plan.from_json(text)
    return plan, fxprune.apply(model, plan, example).fxprune.report.verification


def _saved(model: Any, folder: Path, example: Any) -> tuple[Plan, Any]:
    import fxprune

    pruned = fxprune.load(folder, model)
    plan = pruned.fxprune.plan
    if _was_fitted(folder):
        return plan, _of_the_plan(model, plan, example)
    try:
        return plan, fxprune.verify(model, pruned, plan, example)
    except VerificationError as error:
        error.hint = (
            "the model must have the weights it was pruned with, the same --weights, or --seed; "
            "a network that was trained or compensated after pruning differs too"
        )
        raise


def _was_fitted(folder: Path) -> bool:
    from ..saving import report_of

    report = report_of(folder)
    return report is not None and report.compensation is not None


def _of_the_plan(model: Any, plan: Plan, example: Any) -> Verification:
    """What holds of a network that was fitted: its plan, proven on weights as they were before, as
    numbers of its own are meant to differ. That it has the plan's shapes, loading has shown."""
    import fxprune

    from ..verifier import Verification

    found = fxprune.apply(model, plan, example).fxprune.report.verification
    return Verification(found.shapes, note=_FITTED)


def _described(plan: Plan) -> dict[str, Any]:
    return {
        "model": plan.model,
        "criterion": plan.criterion,
        "rate": plan.rate,
        "removed": plan.removed,
    }


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise NamingError(
            f"the plan {path} cannot be read: {why}",
            hint="fxprune prune MODEL -o FOLDER writes one, and --plan FILE does",
        ) from None
