"""Sources of activations to train on: a finished store, one that is still being recorded, or a language model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from latentprior.config import TrainConfig, settings_of
from latentprior.config.base import bytes_of
from latentprior.data import text
from latentprior.data.moments import Covariance, Moments
from latentprior.data.partition import Batch, BatchPartition
from latentprior.data.store.follow import Follower, wait_for_rows
from latentprior.data.store.manifest import LEFT_OUT, write_file
from latentprior.data.store.reader import ActivationStore
from latentprior.data.store.writer import StoreWriter
from latentprior.data.stream.buffer import MixingBuffer, buffered_batches, check_memory
from latentprior.data.stream.live import LiveActivations
from latentprior.data.text_files import text_settings
from latentprior.lm.hooks import Hookpoint, drop_blocks_after, same_places
from latentprior.lm.loading import load_llm
from latentprior.prior.normalizer import Normalizer
from latentprior.utils.errors import InputError

LEAST_TOKENS = 256  # of a forward pass, however small the buffer is


class ActivationSource(ABC):
    """Activations to train on."""

    hookpoints: tuple[Hookpoint, ...]
    source: dict[str, Any]  # where they come from, as JSON values
    identity: dict[str, Any]  # what decides the rows and their order, as JSON values

    def __init__(self, config: TrainConfig, partition: BatchPartition) -> None:
        self.config, self.partition = config, partition

    @property
    def blocks(self) -> int | None:
        """Blocks of the language model, if the activations are from several of them."""
        return self.source.get("blocks") if len(self.hookpoints) > 1 else None

    @abstractmethod
    def normalizer(self) -> Normalizer:
        """Statistics of the activations; called before the first batch."""

    def kept_moments(self, compute: Callable[[], Moments]) -> Moments:
        """The moments in the run's folder, computed and saved there if they are missing: a resumed run has the same."""
        if self.config.resolved_recipe().normalizer == "whitened":
            raise InputError("recipe.normalizer 'whitened' needs a finished store")
        path, world = Path(self.config.run.output) / "statistics.safetensors", self.partition.world
        if not world.first(path.is_file()):
            moments = compute()
            if world.main:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, [save(moments.state_dict())])
            world.wait()
        return Moments.from_state_dict(load_file(path))

    @abstractmethod
    def sample(self, rows: int) -> Batch:
        """About so many of the activations, the same in every process; called after `normalizer`."""

    @abstractmethod
    def batches(self, step: int, position: dict[str, Any] | None, *, save: Callable[[], object]) -> Iterator[Batch]:
        """This process's rows of the batches from number `step` and `position` on; `save` is called between two."""

    def position(self) -> dict[str, Any] | None:
        """What `batches` needs besides the step to continue here, as JSON values; called by every process."""
        return None

    def saved(self) -> None:  # noqa: B027
        """The last position is saved: what came before it is not needed any more."""

    def heldout(self) -> Batch | None:
        """Rows of documents that the source itself holds out, the same in every process; called after `normalizer`."""
        return None

    def distinct(self, rows: int) -> int:
        """How many different activations `rows` drawn ones were."""
        return rows

    def left_out(self) -> dict[str, int]:
        """What was left out of the rows up to the last `position`, by reason, over all processes."""
        return {}

    def seconds(self) -> dict[str, float]:
        """Where this source's time went."""
        return {}

    def close(self) -> None:  # noqa: B027
        """The run is complete."""


class StoreSource(ActivationSource):
    """A finished store, or some of its layers, gone through in random order as often as needed."""

    def __init__(self, config: TrainConfig, partition: BatchPartition) -> None:
        super().__init__(config, partition)
        self.store = store = ActivationStore(_path(config))
        self.source: dict[str, Any] = store.manifest["source"]
        self.hookpoints = store.hookpoints_at(config.layers)
        self.layers = [hookpoint.layer for hookpoint in self.hookpoints]
        self._rows = len(store.rows_at(self.layers))
        # By its rows: the folder may move.
        self.identity = {"store": store.manifest["statistics"]["sha256"], "rows": self._rows}
        if len(self.layers) < len(store.layers):
            self.identity["layers"] = self.layers
        store.batches(partition.batch, layers=self.layers)  # refuses fewer rows than a batch

    def normalizer(self) -> Normalizer:
        moments = self.store.moments().at(self.layers)
        if self.config.resolved_recipe().normalizer == "whitened":
            total = Covariance(self.layers, self.store.width)
            for indices in self.store.rows_at(self.layers).split(2**16):
                total.update(self.store.rows(indices), self.store.metadata(indices)[0])
            return Normalizer.whitened(moments, total.covariance())
        return Normalizer.from_moments(moments)

    def sample(self, rows: int) -> Batch:
        return _drawn(self.store, rows, self.layers)

    def batches(self, step: int, position: dict[str, Any] | None, *, save: Callable[[], object]) -> Iterator[Batch]:
        own, seed = self.partition.positions(), self.config.run.seed
        for x, layer in self.store.batches(self.partition.batch, seed=seed, start=step, own=own, layers=self.layers):
            yield Batch(x, layer)

    def distinct(self, rows: int) -> int:
        return min(rows, self._rows)


class FollowedStoreSource(ActivationSource):
    """A store that another process is recording: every row once, in the order of the shards."""

    def __init__(self, config: TrainConfig, partition: BatchPartition, stop: Callable[[], bool]) -> None:
        super().__init__(config, partition)
        if partition.world.size > 1:
            raise InputError("a store that is being recorded is followed by one process: train with --from llm instead")
        self._stop = stop
        self.store = wait_for_rows(_path(config), config.stream.statistics, config.store.wait_seconds, stop=stop)
        self.hookpoints = self.store.hookpoints_at(config.layers)
        if len(self.hookpoints) < len(self.store.layers):
            raise InputError(f"a store that is followed gives all its layers, {list(self.store.layers)}: omit --layers")
        self.source: dict[str, Any] = self.store.manifest["source"]
        self.identity = {"source_of_rows": self.source, "statistics": config.stream.statistics}
        self._follower: Follower | None = None
        self._saved: dict[str, Any] | None = None

    def normalizer(self) -> Normalizer:
        return Normalizer.from_moments(self.kept_moments(self.store.moments))

    def sample(self, rows: int) -> Batch:
        return _drawn(self.store, rows, list(self.store.layers))

    def batches(self, step: int, position: dict[str, Any] | None, *, save: Callable[[], object]) -> Iterator[Batch]:
        self._follower = Follower(
            _path(self.config),
            self.partition.batch,
            seed=self.config.run.seed,
            state=position,
            wait_seconds=self.config.store.wait_seconds,
            stop=self._stop,
            on_wait=save,  # the recorder waits for a release, which follows a save
        )
        for x, layer in self._follower:
            yield Batch(x, layer, None if len(x) == self.partition.batch else torch.arange(len(x)))

    def position(self) -> dict[str, Any] | None:
        self._saved = self._follower.state() if self._follower else None
        return self._saved

    def saved(self) -> None:
        if self._follower is not None and self._saved is not None:
            self._follower.release(self._saved)


class LanguageModelSource(ActivationSource):
    """What a language model computes meanwhile, through a mixing buffer; nothing is stored unless asked for."""

    def __init__(self, config: TrainConfig, partition: BatchPartition, device: torch.device) -> None:
        super().__init__(config, partition)
        options = config.stream
        text.documents(options.text)  # an unknown file, data set or column shows before the model is loaded
        model, tokenizer = load_llm(options.llm, device)
        self._live = live = LiveActivations(model, tokenizer, options, config.layers, partition)
        self.hookpoints = tuple(live.hookpoints)
        blocks = drop_blocks_after(model, max(config.layers))  # their memory is the trainer's
        itemsize = next(model.parameters()).element_size()
        self._buffered_batches = count = buffered_batches(options.buffer, partition, self.hookpoints, itemsize)
        # What a shard has computed and not yet given waits for the next filling: at most half a share of the buffer.
        share = count * partition.batch // partition.shards // len(self.hookpoints)
        live.batch_tokens = min(options.batch_tokens, max(share // 2, LEAST_TOKENS))
        self._buffer_device = torch.device("cpu") if options.buffer_device == "cpu" else device
        check_memory(count * partition.most_rows * live.width * itemsize, self._buffer_device)
        live.open()  # wrong files and columns show before anything is computed
        self.source = stream_source(config) | {"blocks": blocks}
        self.identity = {"source_of_rows": self.source, "turns": count, "lanes": partition.shards}
        self._buffer: MixingBuffer | None = None
        self._keep: StoreWriter | None = None
        self._left_out: dict[str, int] = {}

    def normalizer(self) -> Normalizer:
        moments = self.kept_moments(self._live.statistics)
        self._live.medians = dict(zip(moments.layers, moments.median_norm.tolist(), strict=True))
        return Normalizer.from_moments(moments)

    def sample(self, rows: int) -> Batch:
        found = self._live.rows_of(self.config.stream.text, rows)
        assert found is not None  # `normalizer` has read some
        return found

    def batches(self, step: int, position: dict[str, Any] | None, *, save: Callable[[], object]) -> Iterator[Batch]:
        run = self.config.run
        if self.config.stream.record_to:
            self._keep = self._writer(Path(self.config.stream.record_to))
        steps = -(-run.activations // self.partition.batch)
        count, device = self._buffered_batches, self._buffer_device
        self._buffer = MixingBuffer(self._live, count, device, seed=run.seed, steps=steps, keep=self._keep)
        yield from self._buffer.batches(step, position)

    def _writer(self, folder: Path) -> StoreWriter:
        world = self.partition.world
        if world.size > 1:
            folder = folder / f"{world.rank + 1}-of-{world.size}"
        budget = bytes_of("disk_budget", self.config.stream.disk_budget)
        writer = StoreWriter(folder, self.hookpoints, source=self.source, resume=True, budget=budget)
        writer.sink_thresholds = self._live.sink_thresholds()
        writer.moments.median_norm[:] = torch.tensor(list(self._live.medians.values()))
        return writer

    def position(self) -> dict[str, Any]:
        assert self._buffer is not None
        if self._keep is not None:
            self._keep.flush()  # what lies before the position will not be streamed again
        position = self._buffer.position()
        self._left_out = {reason: sum(shard[reason] for shard in position["lanes"]) for reason in LEFT_OUT}
        return position

    def left_out(self) -> dict[str, int]:
        return self._left_out

    def heldout(self) -> Batch | None:
        text = self.config.stream.text
        if text.part != "train" or not text.heldout:
            return None
        return self._live.rows_of(replace(text, part="heldout", limit=None), self.config.run.heldout_activations)

    def seconds(self) -> dict[str, float]:
        return {"llm": self._live.seconds, "buffer": self._buffer.seconds if self._buffer else 0.0}

    def close(self) -> None:
        if self._keep is not None:
            self._keep.close()


def open_source(
    config: TrainConfig, partition: BatchPartition, device: torch.device, stop: Callable[[], bool]
) -> ActivationSource:
    """What `config` says to train on, checked before anything is computed; `Stopped` if `stop` says so meanwhile."""
    if config.source == "llm":
        return LanguageModelSource(config, partition, device)
    if config.store.follow:
        return FollowedStoreSource(config, partition, stop)
    return StoreSource(config, partition)


def stored_heldout(config: TrainConfig, hookpoints: Sequence[Hookpoint]) -> Batch | None:
    """Rows of the held-out store that `config` names, the same at every call; it must be of these hookpoints."""
    if config.store.heldout is None:
        return None
    store = ActivationStore(config.store.heldout)
    layers = [h.layer for h in hookpoints] if config.layers else store.layers
    if not same_places([h for h in store.hookpoints if h.layer in layers], hookpoints):
        raise InputError(f"{store.folder} was recorded at other hookpoints than the activations to train on")
    return _drawn(store, config.run.heldout_activations, layers)


def _drawn(store: ActivationStore, rows: int, layers: Sequence[int]) -> Batch:
    """So many rows of a store, or all that it has, at random, the same at every call."""
    size = min(rows, len(store.rows_at(layers)))
    return Batch(*next(store.batches(size, seed=0, layers=layers)))


def stream_source(config: TrainConfig) -> dict[str, Any]:
    """Where the rows of a stream come from, as far as that is known before the language model is loaded."""
    rows = {"layers": config.layers, "text": text_settings(config.stream.text)}
    source = settings_of(config.stream) | rows
    if config.stream.chunks:
        source["long_documents"] = "chunk"
    else:
        del source["long_documents"]  # as before there were chunks, so that older runs continue
    del source["llm"]["device_map"]
    return source


def _path(config: TrainConfig) -> str:
    assert config.store.path is not None  # `TrainConfig` refuses a source "store" without one
    return config.store.path
