"""Errors that say what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FxpruneError(Exception):
    """Base of every error fxprune raises on purpose.

    ``fault`` is one line, whatever stood in a file that it names; ``details`` are (label, text)
    rows that say where the fault lies; ``hint`` says what to do.
    """

    def __init__(self, fault: str, *, details: Iterable[tuple[str, str]] = (), hint: str = ""):
        self.fault = fault = " ".join(fault.splitlines())
        self.details = [(label, text) for label, text in details if text]
        self.hint = hint
        super().__init__(fault)

    def __str__(self) -> str:
        width = max((len(label) for label, _ in self.details), default=0)
        lines = [self.fault, *(f"  {label:<{width}}  {text}" for label, text in self.details)]
        if self.hint:
            lines += ["", f"hint: {self.hint}"]
        return "\n".join(lines)

    def __reduce__(self):
        return _rebuild, (type(self), self.fault, self.details, self.hint)


def _rebuild(cls, fault, details, hint):
    return cls(fault, details=details, hint=hint)


class ModelError(FxpruneError):
    """The model cannot be pruned as it was handed in: lazy, quantized, wrapped, not finite."""


class InputError(FxpruneError):
    """The example inputs do not fit the model, or none could be guessed."""


class TraceError(FxpruneError):
    """The model's forward could not be turned into a graph."""


class RuleError(FxpruneError):
    """A rule file, or a rule in it, is broken; or a rule does not fit the call it was used on."""


class RecipeError(FxpruneError):
    """A recipe is not known, or its file is broken."""


class OptionError(FxpruneError):
    """An option has a value that cannot be used."""


class CriterionError(FxpruneError):
    """A criterion returned something that is not one finite score a channel."""


class NothingToPrune(FxpruneError):
    """No channel of the model may go."""


class NamingError(FxpruneError):
    """A text names no model, or what it names, or a file of weights, cannot be read."""


class SaveError(FxpruneError):
    """A file cannot be written, or a saved network is missing, damaged or foreign."""


class PlanError(FxpruneError):
    """A plan does not fit the model, or cannot be read."""


class VerificationError(FxpruneError):
    """The pruned network does not compute what the masked original computes."""


def nearest(word: str, known: Iterable[str]) -> str:
    """``did you mean `x`?`` for the known word closest to `word`, or an empty string."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean `{found[0]}`?" if found else ""


def first_line(error: BaseException) -> str:
    """The first line of an exception's text; its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
