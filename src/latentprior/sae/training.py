"""Training a TopK SAE on recorded activations, with the sparse coder and the optimizer of `eai-sparsify`.

Its trainer takes a language model and tokens, prints, and keeps its own checkpoints, so the loop over a store is here;
what is learned (TopK encoder with its sparse backward pass, decoder of unit norm, fraction of variance unexplained as
the loss) and how (signed momentum, schedule-free average) are theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentprior.config import SAEConfig, settings_of
from latentprior.data.store.reader import ActivationStore
from latentprior.lm.hooks import Hookpoint, at_layer
from latentprior.sae.sae import CONFIG, SAE
from latentprior.sae.saelens import read_sae
from latentprior.utils.errors import InputError
from latentprior.utils.locks import locked
from latentprior.utils.progress import Report, silent

BATCH = 1024
EPOCHS, MOST = 5, 1_000_000  # activations to train on, unless the configuration says
MOMENTUM = 0.95
# At 16,384 latents; half of sparsify's own, whose batches are 64 times as large. On SmolLM2's layer 15, with 2,304
# latents and 120,000 activations: explained variance 0.737 and 99% of the latents alive; with sparsify's 0.734 and 86%.
RATE = 2.5e-3


def prepare_sae(
    config: SAEConfig,
    folder: Path,
    store: str | None,
    hookpoint: Hookpoint,
    *,
    device: torch.device | str = "cpu",
    report: Report = silent,
) -> SAE:
    """The SAE in `folder` if there is one, checked to be of `hookpoint`; else one trained on `store` and kept there."""
    if (folder / CONFIG).is_file() or (folder / "cfg.json").is_file():
        sae = read_sae(folder)
        _check_settings(sae, config, folder)
    elif store is None:
        raise InputError(f"there is no SAE in {folder} and nothing to train one on: give --train")
    else:
        activations = ActivationStore(store)
        for recorded in activations.hookpoints:
            if recorded.layer == hookpoint.layer:
                _check_hookpoint(recorded, hookpoint, store)
        with locked(folder):
            sae = train_sae(activations, config, hookpoint.layer, device=device, report=report)
            sae.save(folder)
    _check_hookpoint(sae.hookpoint, hookpoint, folder)
    return sae.to(device)


def _check_hookpoint(found: Hookpoint, wanted: Hookpoint, folder: Path | str) -> None:
    if not found.same_place(wanted):
        raise InputError(f"{folder} belongs to {found}, but this prior to {wanted}")


def _check_settings(sae: SAE, config: SAEConfig, folder: Path) -> None:
    stored, wanted = sae.provenance.get("settings", {}), settings_of(config)
    if config.activations is None:
        del wanted["activations"]  # however many it saw
    for name, value in stored.items():
        if name in wanted and wanted[name] != value:
            advice = f"give --sae.{name} {value} or another --sae.path"
            raise InputError(f"{folder} holds an SAE of {name} {value}, not {wanted[name]}: {advice}")


def train_sae(
    store: ActivationStore,
    config: SAEConfig,
    layer: int,
    *,
    device: torch.device | str = "cpu",
    report: Report = silent,
) -> SAE:
    """A TopK SAE (Gao et al., 2024) of one layer of `store`.

    It sees activations scaled to a mean variance of 1, so that biases and weights learn at one rate; the SAE that is
    returned takes raw ones. Needs the extra `[sae]`.
    """
    hookpoint = at_layer(store.hookpoints, layer, store.folder)
    variance = float(store.moments().variance()[store.layers.index(layer)].sum())
    if not variance > 0:
        raise InputError(f"{store.folder} holds no activations of layer {layer} to train an SAE on, or equal ones")
    scale = (store.width / variance) ** 0.5
    coder, optimizer = _coder_and_optimizer(store.width, config, device)
    seen, left = 0, 1.0
    total = config.activations or min(EPOCHS * len(store.rows_at([layer])), MOST)
    for x in _batches(store, layer, total, config.seed):
        x = x.to(device) * scale
        if not seen:
            coder.b_dec.data = x.mean(dim=0)
        coder.set_decoder_norm_to_unit_norm()
        loss = coder(x).fvu
        if not torch.isfinite(loss):
            raise InputError("the SAE's loss is not finite: lower --sae.learning-rate")
        loss.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        seen += len(x)
        left += 0.05 * (loss.item() - left)
        report(seen, total, {"unexplained": left})
    optimizer.eval()  # from the iterate to its average
    encoder, decoder = coder.encoder.weight.detach().cpu(), coder.W_dec.detach().cpu()
    centre = coder.b_dec.detach().cpu()
    provenance = {
        "trainer": "eai-sparsify's sparse coder",
        "store": str(store.folder),
        "rows": len(store),
        "activations_seen": seen,
        "settings": settings_of(config) | {"activations": total},
    }
    bias = (coder.encoder.bias.detach().cpu() - encoder @ centre) / scale
    return SAE.of(encoder, bias, decoder, centre / scale, hookpoint, k=config.k, provenance=provenance)


def _batches(store: ActivationStore, layer: int, total: int, seed: int) -> Iterator[Tensor]:
    """Batches of one layer's activations, shuffled anew in every epoch, until `total` are seen."""
    seen = 0
    size = min(BATCH, len(store.rows_at([layer])))
    for x, _ in store.batches(size, seed=seed, layers=[layer]):
        x = x[: total - seen].float()
        seen += len(x)
        yield x
        if seen >= total:
            return


def _coder_and_optimizer(width: int, config: SAEConfig, device: torch.device | str) -> tuple[Any, Any]:
    """A fresh sparse coder and its optimizer; the global generator is left as it was."""
    try:
        with redirect_stdout(StringIO()):  # sparsify prints on import which decoder it uses
            from schedulefree import ScheduleFreeWrapper
            from sparsify import SparseCoder, SparseCoderConfig
            from sparsify.sign_sgd import SignSGD
    except ImportError as error:
        raise InputError(f'training an SAE needs an extra: pip install "latentprior[sae]" ({error})') from error

    class Coder(SparseCoder):
        """Decodes on the CPU without Triton: sparsify takes its GPU kernel wherever Triton is installed."""

        def decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
            if top_acts.is_cuda or self.W_dec is None:
                return super().decode(top_acts, top_indices)
            return F.embedding_bag(top_indices, self.W_dec, per_sample_weights=top_acts, mode="sum") + self.b_dec

    latents = config.expansion * width
    if config.k > latents:
        raise InputError(f"SAEConfig.k is {config.k}, but there are only {latents} latents")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        coder = Coder(width, SparseCoderConfig(num_latents=latents, k=config.k), device, dtype=torch.float32)
    rate = config.learning_rate or RATE / (latents / 2**14) ** 0.5
    optimizer = ScheduleFreeWrapper(SignSGD(coder.parameters(), rate), momentum=MOMENTUM)
    optimizer.train()
    return coder, optimizer
