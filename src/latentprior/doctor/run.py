"""One line for each thing that must be true of a model, a prior and a machine: `doctor`, `examine`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from textwrap import shorten
from typing import Any, Literal

from torch import nn

from latentprior.config import DoctorConfig
from latentprior.doctor.checks import CHECKS
from latentprior.doctor.patient import Patient, Skipped
from latentprior.lm.loading import load_llm
from latentprior.prior.glp import GLP
from latentprior.utils.devices import fast_dtype, resolve_device
from latentprior.utils.errors import InputError
from latentprior.utils.progress import Report, silent

Status = Literal["ok", "failed", "skipped"]


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, how it came out, and its figures or, in plain words, what is wrong."""

    name: str
    status: Status
    detail: str


def doctor(config: DoctorConfig, *, report: Report = silent) -> list[Check]:
    """Whether the language model and the prior that `config` names work on this machine.

    A check that fails or raises is a line of its own; those that need what failed are skipped, all others run.
    """

    def load_prior() -> GLP:
        if config.prior is None:
            raise Skipped("no --prior given")
        device = resolve_device(config.device)
        return GLP.from_pretrained(config.prior, device=device, dtype=fast_dtype(device))

    return _examine(
        Patient(config.device, lambda: load_llm(config.llm, config.device), load_prior, config.layer), report
    )


def examine(
    model: nn.Module, tokenizer: Any, prior: GLP | None = None, *, layer: int | None = None, report: Report = silent
) -> list[Check]:
    """`doctor` for a model that is loaded, and in evaluation mode; it is as before afterwards.

    Args:
        layer: the block whose output is recorded and edited; by default the prior's, else the middle one.
    """

    def load_prior() -> GLP:
        if prior is None:
            raise Skipped("no prior given")
        return prior

    device = str(next(model.parameters()).device)
    return _examine(Patient(device, lambda: (model, tokenizer), load_prior, layer), report)


def _examine(patient: Patient, report: Report) -> list[Check]:
    done: dict[str, Check] = {}
    for number, (name, (needs, look)) in enumerate(CHECKS.items()):
        report(number, len(CHECKS), {"check": name})
        missing = next((need for need in needs if done[need].status != "ok"), None)
        done[name] = _check(name, look, patient) if missing is None else Check(name, "skipped", f"needs: {missing}")
    report(len(CHECKS), len(CHECKS), {})
    return list(done.values())


def _check(name: str, look: Callable[[Patient], str], patient: Patient) -> Check:
    try:
        return Check(name, "ok", look(patient))
    except Skipped as reason:
        return Check(name, "skipped", str(reason))
    except InputError as error:
        return Check(name, "failed", " ".join(str(error).split()))
    except Exception as error:  # whatever a model, a driver or a library raises is a finding
        return Check(name, "failed", f"{type(error).__name__}: {shorten(str(error), 300)}")
