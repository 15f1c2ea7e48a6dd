"""Everything that `latentprior neurons` collects: one pass of documents through language model and prior."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentprior.config import NeuronsConfig, settings_of, to_dict
from latentprior.data import text, tokens
from latentprior.data.text import Document
from latentprior.data.text_files import text_settings
from latentprior.lm.hooks import Hookpoint
from latentprior.lm.loading import load_llm
from latentprior.neurons.document_batches import DocumentBatch, DocumentTokens, distinct, document_batches
from latentprior.neurons.neighbours import nearest_units, sampled_units
from latentprior.neurons.reservoir import Reservoir
from latentprior.neurons.statistics import BINS, SPAN, THRESHOLDS, Calibration, UnitStatistics
from latentprior.neurons.store import INFO, NeuronStore, write_store, write_units
from latentprior.neurons.store_tables import example_tables, unit_table, with_tasks
from latentprior.neurons.token_strings import TokenStrings
from latentprior.neurons.top_documents import TopDocuments
from latentprior.neurons.top_logits import top_logits
from latentprior.neurons.top_probing_units import ProbedTask, read_top_probing_units
from latentprior.neurons.unit_reader import UnitReader
from latentprior.prior.glp import GLP
from latentprior.prior.loading import heldout_loss, hookpoint_of, packages_of, priors_of
from latentprior.utils.errors import InputError
from latentprior.utils.locks import locked
from latentprior.utils.progress import Phase, Report, silent, unseen
from latentprior.utils.provenance import stamp
from latentprior.utils.settings import check_settings

CALIBRATION = 32768  # tokens after which each unit's centre and scale are fixed
QUANTILES = (0.5, 0.75, 0.9, 0.97, 1.0)


def neurons(config: NeuronsConfig, *, phase: Phase = unseen) -> dict[str, Any]:
    """Read a prior's units over documents as `config` says, write the store and return what is in neurons.json.

    A store that an earlier run with the same settings wrote is kept, as it is or with the tasks of `config.probe`;
    one of other settings, or that another process writes, is an `InputError`.
    """
    with locked(config.output):
        prior = {"checkpoint": config.checkpoint, "layer": config.layer}
        priors, hookpoint = priors_of([config.prior], **prior, device=config.device, precision=config.precision)
        glp = priors[config.prior]
        tasks = _tasks(config, glp, hookpoint)  # a probing run that does not fit is refused before the model is loaded
        if Path(config.output, INFO).exists():
            return _kept(config, glp, tasks)
        documents = text.documents(config.text)
        model, tokenizer = load_llm(config.llm, config.device)
        return collect_units(config, glp, model, tokenizer, documents, phase=phase)


def collect_units(
    config: NeuronsConfig,
    glp: GLP,
    model: nn.Module,
    tokenizer: Any,
    documents: Iterable[Document],
    *,
    phase: Phase = unseen,
) -> dict[str, Any]:
    """`neurons` for a prior, a language model and documents at hand; the prior keeps its precision and device.

    Documents are read until `config.tokens` tokens counted; of those that are equal as far as they are read, the first.
    What is kept depends on the documents that were read, not on their batches. A stop before the end leaves no store,
    or the one that was there.
    """
    began = time.perf_counter()
    hookpoint = hookpoint_of(glp, config.prior, config.layer)
    hookpoint.check(model)
    tasks = _tasks(config, glp, hookpoint)
    reader = UnitReader(glp, t=config.t, noises=config.noises, layer=config.layer, seed=config.seed)
    batches = tokens.tokenize(documents, tokenizer, max_length=config.max_length, batch_tokens=config.batch_tokens)
    found = Collected(config, reader, glp.device)
    found.read(document_batches(model, distinct(batches), hookpoint, glp, config.layer), report=phase("read documents"))

    report = phase("tokens, neighbours, examples")
    logits = None
    if config.promoted:
        logits = top_logits(glp, model, hookpoint, config.promoted, layer=config.layer, vocabulary=len(tokenizer))
    report(1, 3, {})
    sample = found.reservoir.documents()
    neighbours = nearest_units(sampled_units(reader, sample, found.statistics), config.neighbours)
    report(2, 3, {})
    strings = TokenStrings(tokenizer)
    units = unit_table(found.statistics, logits, neighbours, tasks, strings)
    examples = example_tables(found.top, found.bottom, reader, sample, QUANTILES, found.documents, strings)
    info = {
        "kind": "neurons",
        "prior": config.prior,
        "hookpoint": hookpoint.to_dict(),
        "t": config.t,
        "blocks": len(reader.blocks),
        "d_mlp": reader.d_mlp,
        "documents": len(found.documents),
        "tokens": found.tokens,
        "max_length": config.max_length,
        "corpus": to_dict(config.text),
        "settings": _settings(config, glp),
        "thresholds": list(THRESHOLDS),
        "histogram": {"bins": BINS, "span": SPAN},
        "calibration_tokens": found.calibration_tokens,
        "reservoir": {"documents": len(sample.doc), "tokens": len(sample)},
        "quantiles": list(QUANTILES),
        **stamp(
            to_dict(config), seed=config.seed, wall_seconds=time.perf_counter() - began, packages=packages_of([glp])
        ),
    }
    write_store(Path(config.output), info, units, examples)
    report(3, 3, {})
    return info


class Collected:
    """What is kept of documents that stream by; its size depends on units and settings, save 4 bytes a token."""

    def __init__(self, config: NeuronsConfig, reader: UnitReader, device: torch.device) -> None:
        self._reader, self._wanted = reader, config.tokens
        shape = (reader.d_mlp, config.top, config.max_length)
        self.top = [TopDocuments(*shape, sign=1, device=device) for _ in reader.blocks]
        self.bottom = [TopDocuments(*shape, sign=-1, device=device) for _ in reader.blocks]
        self.reservoir = Reservoir(config.reservoir, seed=config.seed)
        self.documents = DocumentTokens()
        self.statistics: list[UnitStatistics] = []
        self.tokens = self.calibration_tokens = 0

    def read(self, batches: Iterable[DocumentBatch], *, report: Report = silent) -> None:
        batches = iter(batches)
        first = list(_until(batches, min(CALIBRATION, self._wanted)))
        self.calibration_tokens = sum(map(len, first))
        if not self.calibration_tokens:
            raise InputError("no text has a token that counts: none lies after the first position")
        self.statistics = self._calibrate(first)
        for batch in _until(chain(first, batches), self._wanted):
            if len(batch):
                self._update(batch)
            report(self.tokens, self._wanted, {})

    def _calibrate(self, batches: list[DocumentBatch]) -> list[UnitStatistics]:
        """Empty statistics of each block's units, with their centres and scales over `batches`."""
        calibrations = [Calibration(self._reader.d_mlp, batches[0].x.device) for _ in self._reader.blocks]
        for batch in batches:
            for calibration, units in zip(calibrations, self._reader(batch.x), strict=True):
                calibration.update(units)
        return [calibration.statistics() for calibration in calibrations]

    def _update(self, batch: DocumentBatch) -> None:
        filled = batch.filled()
        for block, units in enumerate(self._reader(batch.x)):
            self.statistics[block].update(units)
            units = units.bfloat16()
            grid = units.index_select(0, filled.flatten()).view(*filled.shape, -1)
            self.top[block].update(units, grid.amax(dim=1), batch.row, batch.doc)
            self.bottom[block].update(units, grid.amin(dim=1), batch.row, batch.doc)
        self.reservoir.update(batch)
        self.documents.update(batch)
        self.tokens += len(batch)


def _until(batches: Iterable[DocumentBatch], tokens: int) -> Iterator[DocumentBatch]:
    """Batches up to the one that makes `tokens` full; none is asked for after it."""
    done = 0
    for batch in batches:
        yield batch
        done += len(batch)
        if done >= tokens:
            return


def _settings(config: NeuronsConfig, glp: GLP) -> dict[str, Any]:
    own = {"text": text_settings(config.text), "model": config.llm.model, "heldout_loss": heldout_loss(glp)}
    return settings_of(config) | own


def _kept(config: NeuronsConfig, glp: GLP, tasks: dict[int, list[ProbedTask]]) -> dict[str, Any]:
    """The store that is there, with the tasks of the probing run that `config` names."""
    store = NeuronStore(config.output)
    check_settings(config.output, "units", store.info.get("settings", {}), _settings(config, glp))
    if config.probe is None:
        return store.info
    info = store.info | {"config": to_dict(config)}
    write_units(config.output, info, with_tasks(store.units, tasks))
    return info


def _tasks(config: NeuronsConfig, glp: GLP, hookpoint: Hookpoint) -> dict[int, list[ProbedTask]]:
    if config.probe is None:
        return {}
    shape = glp.denoiser.config
    return read_top_probing_units(config.probe, config.t, hookpoint, blocks=shape.n_layers, d_mlp=shape.d_mlp)
