"""Everything that `latentprior evaluate` measures, as one JSON-ready result."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentprior.config import EvaluateConfig, Solver, to_dict
from latentprior.data import text, tokens
from latentprior.data.store.reader import ActivationStore
from latentprior.evaluation.lm_loss import Replacement, delta, lm_losses
from latentprior.evaluation.velocity import velocity_errors
from latentprior.lm.hooks import Hookpoint, at_layer
from latentprior.lm.loading import load_llm
from latentprior.prior.glp import GLP
from latentprior.prior.loading import packages_of, priors_of
from latentprior.prior.repair import hookpoints_on
from latentprior.sae.sae import SAE, described
from latentprior.sae.training import prepare_sae
from latentprior.stats.bootstrap import bootstrap_interval
from latentprior.stats.distances import classifier_two_sample, least_rows, sliced_wasserstein
from latentprior.stats.frechet import GaussianMoments, frechet_parts
from latentprior.stats.gaussian import GaussianPrior
from latentprior.training.loss import BINS, heldout_errors
from latentprior.utils.devices import fast_dtype, resolve_device
from latentprior.utils.errors import InputError
from latentprior.utils.files import replace_json
from latentprior.utils.locks import locked
from latentprior.utils.progress import Phase, Report, silent, unseen
from latentprior.utils.provenance import stamp
from latentprior.utils.results import Result

PLOTTED = 1000  # points of each kind in the PCA figure


def evaluate(
    config: EvaluateConfig, *, glp: GLP | None = None, llm: tuple[Any, Any] | None = None, phase: Phase = unseen
) -> Result:
    """Measure a prior as `config` says, write ``evaluate.json`` and return what is in it.

    `glp`, which is not changed, and `llm`, a model and its tokenizer, take the place of those that `config` names.
    """
    with locked(config.output) as folder:
        began = time.perf_counter()
        device = resolve_device(config.device)
        if glp is None:
            glp = GLP.from_pretrained(config.prior, config.checkpoint, device=device)
        else:
            glp = copy.deepcopy(glp).to(device).eval().requires_grad_(False)
        glp.cast(fast_dtype(glp.device) if config.precision == "auto" else getattr(torch, config.precision))
        layer = _layer_of(glp, config)
        hookpoint = at_layer(glp.hookpoints, layer, "this prior") if glp.hookpoints else None
        glp.normalizer.rows(layer)  # an error for a layer without statistics
        compared = _compared(config, hookpoint)
        real, other, fitted, documents = _real_rows(config, glp, layer)
        if config.delta_lm:  # another model, layer or text shows before minutes of other measurements
            text.documents(config.text)
            llm = llm or load_llm(config.llm, glp.device)
            hookpoints_on(glp.hookpoints, llm[0], layer, check_model=True)
        z_fitted = glp.normalizer.normalize(fitted, layer)
        gaussians = {kind: GaussianPrior.fit(z_fitted, covariance=kind) for kind in ("full", "diagonal")}
        sae = _sae(config, hookpoint, glp.device, phase("train the SAE")) if "sae" in config.baseline else None
        result: dict[str, Any] = {"kind": "evaluate", "hookpoint": hookpoint.to_dict() if hookpoint else None}
        result["heldout_loss"] = heldout_by_t(glp, real, layer, seed=config.seed)
        result["velocity"] = velocity_errors(glp, gaussians["full"], real, layer, seed=config.seed)
        result["distribution"], generated = compare_distributions(
            config, glp, real, other, documents, gaussians, layer, sae, compared, report=phase("compare distributions")
        )
        if compared:
            result["compared"] = [
                {"prior": name, "heldout_loss": heldout_by_t(prior, real, _layer_of(prior, config), seed=config.seed)}
                for name, prior in compared.items()
            ]
        if sae is not None:
            result["sae"] = described(sae, other)
        result["pca"] = pca_points(glp.normalizer.normalize(real, layer), glp.normalizer.normalize(generated, layer))
        if config.delta_lm and llm is not None:
            report = phase("delta LM loss")
            references = (gaussians["full"], sae, compared)
            result["delta_lm"] = measure_delta_lm(config, glp, *llm, layer, *references, report=report)
        spent, packages = time.perf_counter() - began, packages_of([glp, *compared.values()])
        result |= stamp(to_dict(config), seed=config.seed, wall_seconds=spent, packages=packages)
        replace_json(folder / "evaluate.json", result)
        return Result(result, table="distribution")


def heldout_by_t(glp: GLP, x: Tensor, layer: int | None, *, seed: int) -> dict[str, Any]:
    """Held-out loss, overall and by noise level, with 95% bootstrap intervals over activations."""
    layers = None if layer is None else torch.full((len(x),), layer)
    error, bins = heldout_errors(glp.denoiser, glp.normalizer, x, layers, seed=seed)

    def estimated(name: str, values: Tensor) -> dict[str, Any]:
        array = values.double().numpy()
        return {name: float(array.mean()), "interval": bootstrap_interval(array, seed=seed)}

    by_t = [{"t": [i / BINS, (i + 1) / BINS], **estimated("loss", error[bins == i])} for i in range(BINS)]
    return {**estimated("mean", error), "by_t": by_t}


def compare_distributions(
    config: EvaluateConfig,
    glp: GLP,
    real: Tensor,
    other: Tensor,
    documents: tuple[Tensor, Tensor],
    gaussians: dict[str, GaussianPrior],
    layer: int | None,
    sae: SAE | None,
    compared: Mapping[str, GLP],
    *,
    report: Report = silent,
) -> tuple[list[dict[str, Any]], Tensor]:
    """Distances of samples from `real` [N, d], a row for each source, and the prior's last samples.

    `other` real activations set the lower bound of each distance; an SAE reconstructs these (paper, SAE baseline).
    `documents` says which one each row of `real` and of `other` is from. Priors that are `compared` are sampled in the
    last way only; all is standardised as by `glp`.
    """
    n = len(real)
    runs: list[tuple[Solver, int]] = [(solver, nfe) for nfe in config.nfes for solver in config.solvers]
    total = len(runs) + 3 + (sae is not None) + len(compared)
    z_real = glp.normalizer.normalize(real, layer)
    references = (GaussianMoments.of(real), GaussianMoments.of(z_real))
    rows: list[dict[str, Any]] = []

    def add(source: str, x: Tensor, of: Tensor | None = None, **labels: Any) -> None:
        z = glp.normalizer.normalize(x, layer)
        two_sample = classifier_two_sample(z_real, z, documents=(documents[0], of), seed=config.seed)
        row = {
            "frechet_raw": asdict(frechet_parts(references[0], x)),
            "frechet": asdict(frechet_parts(references[1], z)),
            "sliced_wasserstein": sliced_wasserstein(z_real, z, projections=config.projections, seed=config.seed),
            "two_sample_auc": two_sample.auc,
            "two_sample_interval": (two_sample.low, two_sample.high),
        }
        rows.append({"source": source, **labels, **row})
        report(len(rows), total, {"now": source})

    add("real", other, documents[1])
    for kind, gaussian in gaussians.items():
        z = gaussian.sample(n, generator=torch.Generator().manual_seed(config.seed))
        add(f"gaussian-{kind}", glp.normalizer.denormalize(z, layer))
    if sae is not None:
        add("sae", sae.reconstruct(other), documents[1], latents=sae.latents, k=sae.k)
    generated = real
    for solver, nfe in runs:
        generated = glp.sample(n, steps=nfe, solver=solver, layer=layer, generator=config.seed)
        add("prior", generated, solver=solver, nfe=glp.nfe(nfe, solver=solver))
    for name, prior in compared.items():
        solver, nfe = runs[-1]
        x = prior.sample(n, steps=nfe, solver=solver, layer=_layer_of(prior, config), generator=config.seed)
        add("compared", x, prior=name, solver=solver, nfe=prior.nfe(nfe, solver=solver))
    return rows, generated


def measure_delta_lm(
    config: EvaluateConfig,
    glp: GLP,
    model: nn.Module,
    tokenizer: Any,
    layer: int | None,
    gaussian: GaussianPrior,
    sae: SAE | None,
    compared: Mapping[str, GLP],
    *,
    report: Report = silent,
) -> dict[str, Any]:
    """Delta LM loss of the prior's projection and of its references, at every one of `t_starts`."""
    at, seed = hookpoints_on(glp.hookpoints, model, layer, check_model=True)[0], config.seed
    documents = text.documents(config.text)
    batches = tokens.tokenize(documents, tokenizer, max_length=config.max_length, batch_tokens=config.batch_tokens)
    replacements: dict[str, Replacement] = {}
    labels: dict[str, dict[str, Any]] = {name: {"method": name, "t_start": None} for name in ("mean", "sae")}
    for t_start in config.t_starts:
        for method, replacement in lm_replacements(glp, gaussian, t_start, config, layer).items():
            name = f"{method} {t_start}"
            replacements[name], labels[name] = replacement, {"method": method, "t_start": t_start}
        for prior, other in compared.items():
            name = f"compared {prior} {t_start}"
            replacements[name] = _projection(other, t_start, config, _layer_of(other, config))
            labels[name] = {"method": "compared", "prior": prior, "t_start": t_start}
    mean = glp.normalizer.denormalize(torch.zeros(glp.width, device=glp.device), layer)
    replacements["mean"] = _spare_sinks(glp, layer, lambda x, eps: mean.expand_as(x))
    if sae is not None:
        replacements["sae"] = _spare_sinks(glp, layer, lambda x, eps: sae.reconstruct(x))
    losses = lm_losses(model, list(batches), at.layer, replacements, side=at.side, seed=seed, report=report)
    clean = losses.pop("clean")
    rows = []
    for name, loss in losses.items():
        by_token, by_document = (asdict(delta(loss, clean, per_document=of, seed=seed)) for of in (False, True))
        headline = by_document if config.per_document else by_token
        rows.append(labels[name] | headline | {"per_token": by_token, "per_document": by_document})
    return {
        "clean_loss": clean.mean(per_document=config.per_document),
        "weighted_by": "document" if config.per_document else "token",
        "tokens": int(clean.tokens.sum()),
        "documents": len(clean.tokens),
        "steps": config.steps,
        "solver": config.solver,
        "nfe": glp.nfe(config.steps, solver=config.solver),
        "rows": rows,
    }


def lm_replacements(
    glp: GLP, gaussian: GaussianPrior, t_start: float, config: EvaluateConfig, layer: int | None
) -> dict[str, Replacement]:
    """The prior's projection and its references at one noise level; sinks pass through all of them untouched."""
    normalizer = glp.normalizer

    def noised(x: Tensor, eps: Tensor) -> Tensor:
        return torch.lerp(normalizer.normalize(x, layer), eps, t_start)

    references: dict[str, Replacement] = {
        "gaussian": lambda x, eps: normalizer.denormalize(gaussian.posterior_mean(noised(x, eps), t_start), layer),
        "noise": lambda x, eps: normalizer.denormalize(noised(x, eps), layer),
    }
    spared = {name: _spare_sinks(glp, layer, f) for name, f in references.items()}
    return {"prior": _projection(glp, t_start, config, layer)} | spared


def _projection(glp: GLP, t_start: float, config: EvaluateConfig, layer: int | None) -> Replacement:
    def project(x: Tensor, eps: Tensor) -> Tensor:
        return glp.project(x, t_start=t_start, steps=config.steps, solver=config.solver, noise=eps, layer=layer)

    return project


def pca_points(z_real: Tensor, z_generated: Tensor) -> dict[str, Any]:
    """Real and generated activations on the two leading principal components of the real ones."""
    mean = z_real.mean(dim=0)
    centred = (z_real - mean).double()
    eigenvalues, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    axes = vectors[:, -2:].flip(1)
    share = (eigenvalues[-2:].flip(0) / eigenvalues.sum()).tolist()

    def points(z: Tensor) -> list[list[float]]:
        return [[round(v, 3) for v in row] for row in ((z[:PLOTTED] - mean).double() @ axes).tolist()]

    return {"real": points(z_real), "generated": points(z_generated), "variance_share": share}


def _spare_sinks(glp: GLP, layer: int | None, replacement: Replacement) -> Replacement:
    """`replacement`, computed on the prior's device; attention sinks keep their activation."""

    def spared(x: Tensor, eps: Tensor) -> Tensor:
        here = x.to(glp.device)  # the blocks of a model that is spread are elsewhere
        replaced = replacement(here, eps.to(glp.device)).to(x.dtype)
        return torch.where(glp.normalizer.sinks(here, layer)[:, None], here, replaced).to(x.device)

    return spared


def _sae(config: EvaluateConfig, hookpoint: Hookpoint | None, device: torch.device, report: Report) -> SAE:
    """The SAE to compare the prior with, trained if need be."""
    if hookpoint is None:
        raise InputError("this prior does not say what it was trained on, so no SAE can be compared with it")
    folder = Path(config.sae.path or Path(config.output) / "sae")
    return prepare_sae(config.sae, folder, config.train, hookpoint, device=device, report=report)


def _layer_of(glp: GLP, config: EvaluateConfig) -> int | None:
    """The layer that a prior is called with; one of a single layer is called without it."""
    return config.layer if len(glp.normalizer.layers) > 1 else None


def _compared(config: EvaluateConfig, hookpoint: Hookpoint | None) -> dict[str, GLP]:
    """The priors of `config.compare` by name, all of `hookpoint`."""
    if not config.compare:
        return {}
    if hookpoint is None:
        raise InputError("this prior does not say what it was trained on, so no other one can be compared with it")
    options: Any = {"layer": config.layer, "device": config.device, "precision": config.precision}
    priors, place = priors_of(config.compare, **options)
    if not place.same_place(hookpoint):
        raise InputError(f"{config.compare[0]} is a prior of {place}, {config.prior} of {hookpoint}")
    return priors


def _real_rows(
    config: EvaluateConfig, glp: GLP, layer: int | None
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Two held-out sets from disjoint documents, the rows that Gaussians are fitted to, and both sets' documents."""
    heldout = _open(config.heldout, glp)
    if config.samples < (least := least_rows(heldout.width)):
        few = f"{config.samples} samples are too few for a two-sample test at width {heldout.width}"
        raise InputError(f"{few}: raise --samples to at least {least}")
    chosen = sampled_halves(heldout, layer, config.samples, config.seed)
    real, other = (heldout.rows(rows).float().to(glp.device) for rows in chosen)
    documents = (heldout.metadata(chosen[0])[1], heldout.metadata(chosen[1])[1])
    if config.train is None:
        return real, other, other, documents
    train = _open(config.train, glp)
    fitted = train.rows(_shuffled(train, layer, config.seed)[: config.fit_rows])
    return real, other, fitted.float().to(glp.device), documents


def sampled_halves(store: ActivationStore, layer: int | None, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """`samples` row numbers of either half of the documents (see `document_halves`)."""
    first, second = document_halves(store, layer, seed)
    if (least := min(len(first), len(second))) < samples:
        few = f"half of the documents of {store.folder} hold {least} rows of this layer, less than {samples} samples"
        raise InputError(f"{few}: record more held-out documents or lower --samples")
    return first[:samples], second[:samples]


def document_halves(store: ActivationStore, layer: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Row numbers of a layer in random order, in two halves without a common document.

    Rows of one document are alike: sets that share documents are closer than two samples of the same distribution.
    """
    rows = _shuffled(store, layer, seed)
    doc = store.metadata(rows)[1]
    documents, which = torch.unique(doc, return_inverse=True)
    rank = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    rows_before = torch.bincount(rank[which], minlength=len(documents)).cumsum(0)
    first = (rows_before <= (len(rows) + 1) // 2)[rank[which]]
    return rows[first], rows[~first]


def _shuffled(store: ActivationStore, layer: int | None, seed: int) -> Tensor:
    """Row numbers of a layer in random order."""
    order = torch.randperm(len(store), generator=torch.Generator().manual_seed(seed))
    return order if layer is None else order[store.metadata(order)[0] == layer]


def _open(folder: str, glp: GLP) -> ActivationStore:
    """A store of activations from where the prior was trained."""
    store = ActivationStore(folder)
    for h in store.hookpoints:
        if glp.hookpoints and not any(h.same_place(known) for known in glp.hookpoints):
            raise InputError(f"{folder} was recorded at {h}, not where this prior was: {glp.hookpoints[0]}")
    return store
