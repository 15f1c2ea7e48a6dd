"""Run every check on a configuration (`doctor`) or on a model in memory (`examine`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from textwrap import shorten
from typing import Any, Literal

from torch import nn

from latentprior.config import DoctorConfig
from latentprior.doctor.checks import CHECKS
from latentprior.doctor.subject import Skipped, Subject
from latentprior.lm.loading import load_llm
from latentprior.prior.glp import GLP
from latentprior.utils.devices import fast_dtype, resolve_device
from latentprior.utils.errors import InputError
from latentprior.utils.progress import Report, silent


@dataclass(frozen=True)
class Check:
    """What one check found."""

    name: str
    status: Literal["ok", "failed", "skipped"]
    detail: str  # its figures, or in plain words what is wrong


def doctor(config: DoctorConfig, *, report: Report = silent) -> list[Check]:
    """Whether the language model and the prior that `config` names work on this machine.

    A check that fails, whatever it raises, is one line; the checks that need it are skipped, and all others run.
    """

    def load_prior() -> GLP:
        if config.prior is None:
            raise Skipped("no --prior given")
        device = resolve_device(config.device)
        return GLP.from_pretrained(config.prior, device=device, dtype=fast_dtype(device))

    return _checked(
        Subject(config.device, lambda: load_llm(config.llm, config.device), load_prior, config.layer), report
    )


def examine(
    model: nn.Module, tokenizer: Any, prior: GLP | None = None, *, layer: int | None = None, report: Report = silent
) -> list[Check]:
    """`doctor` for a model in memory, which must be in evaluation mode and is left as it was.

    `layer` is the block whose output is recorded and edited; by default the prior's, else the middle one.
    """

    def load_prior() -> GLP:
        if prior is None:
            raise Skipped("no prior given")
        return prior

    device = str(next(model.parameters()).device)
    return _checked(Subject(device, lambda: (model, tokenizer), load_prior, layer), report)


def _checked(subject: Subject, report: Report) -> list[Check]:
    done: dict[str, Check] = {}
    for number, (name, (needs, check)) in enumerate(CHECKS.items()):
        report(number, len(CHECKS), {"check": name})
        missing = [need for need in needs if done[need].status != "ok"]
        done[name] = Check(name, "skipped", f"needs: {missing[0]}") if missing else _check(name, check, subject)
    report(len(CHECKS), len(CHECKS), {})
    return list(done.values())


def _check(name: str, check: Callable[[Subject], str], subject: Subject) -> Check:
    try:
        return Check(name, "ok", check(subject))
    except Skipped as reason:
        return Check(name, "skipped", str(reason))
    except InputError as error:
        return Check(name, "failed", " ".join(str(error).split()))
    except Exception as error:  # whatever a model, a driver or a library raises is a finding
        return Check(name, "failed", f"{type(error).__name__}: {shorten(str(error), 300)}")
