"""What a training run draws from: a finished store, a store that is still being recorded, or a language model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from latentprior.config import Recipe, TrainConfig, to_dict
from latentprior.config.base import bytes_of
from latentprior.data import text
from latentprior.data.moments import Covariance, Moments
from latentprior.data.partition import Batch, Deal
from latentprior.data.store.follow import Follower, wait_for_rows
from latentprior.data.store.manifest import LEFT_OUT, write_file
from latentprior.data.store.reader import ActivationStore
from latentprior.data.store.writer import StoreWriter
from latentprior.data.stream.buffer import Source, Stream, buffer_turns, check_memory
from latentprior.data.text_files import text_settings
from latentprior.lm.hooks import Hookpoint, check_recorded, drop_blocks_after
from latentprior.lm.loading import load_llm
from latentprior.prior.normalizer import Normalizer
from latentprior.utils.distributed import World
from latentprior.utils.errors import InputError

STREAM_ONLY = (
    *("llm", "text", "layers", "side", "max_length", "long_documents", "batch_tokens", "buffer", "statistics", "sinks"),
)
"""Options that decide the rows of a stream, and mean nothing for a store."""


LEAST_TOKENS = 256  # of a forward pass, however small the buffer is


class Feed(ABC):
    """Activations for training."""

    hookpoints: tuple[Hookpoint, ...]
    source: dict[str, Any]
    """Where they come from, as JSON values."""
    identity: dict[str, Any]
    """What decides the rows and their order, as JSON values."""
    save: Callable[[], object] = staticmethod(lambda: None)
    """Set by the run: saves the training state, for a feed that others wait for."""

    @property
    def blocks(self) -> int | None:
        """Blocks of the language model, if the activations are from several of them."""
        return self.source.get("blocks") if len(self.hookpoints) > 1 else None

    @abstractmethod
    def normalizer(self, recipe: Recipe) -> Normalizer:
        """Statistics of the activations; called before the first batch."""

    @abstractmethod
    def batches(self, step: int, position: dict[str, Any] | None) -> Iterator[Batch]:
        """This process's rows of the batches from number `step` on; `position` is that after the ones before."""

    def position(self) -> dict[str, Any] | None:
        """What `batches` needs besides the step to continue here, as JSON values; called by every process."""
        return None

    def saved(self) -> None:  # noqa: B027
        """The last position is saved: what came before it is not needed any more."""

    def heldout(self, rows: int) -> Batch | None:
        """Activations of held-out documents, if the feed has some of its own; the same in every process."""
        return None

    def distinct(self, rows: int) -> int:
        """How many different activations `rows` drawn ones were."""
        return rows

    def left_out(self) -> dict[str, int]:
        """What was left out of the rows up to the last `position`, by reason, over all processes."""
        return {}

    def seconds(self) -> dict[str, float]:
        """Where this feed's time went."""
        return {}

    def close(self) -> None:  # noqa: B027
        """The run is complete."""


class StoreFeed(Feed):
    """A finished store, or some of its layers, gone through in random order as often as needed."""

    def __init__(self, store: ActivationStore, deal: Deal, seed: int, layers: Sequence[int] = ()) -> None:
        self.store, self.source = store, store.manifest["source"]
        self.layers = _chosen(store, layers)
        self.hookpoints = tuple(h for h in store.hookpoints if h.layer in self.layers)
        self._rows = len(store.rows_at(self.layers))
        # By its rows: the folder may move.
        self.identity = {"store": store.manifest["statistics"]["sha256"], "rows": self._rows}
        if len(self.layers) < len(store.layers):
            self.identity["layers"] = self.layers
        self._deal, self._seed = deal, seed
        store.batches(deal.batch, layers=self.layers)  # refuses fewer rows than a batch

    def normalizer(self, recipe: Recipe) -> Normalizer:
        moments = self.store.moments().at(self.layers)
        if recipe.normalizer == "whitened":
            return Normalizer.whitened(moments, _covariance(self.store, self.layers))
        return Normalizer.from_moments(moments)

    def batches(self, step: int, position: dict[str, Any] | None) -> Iterator[Batch]:
        own = self._deal.positions()
        of = self.store.batches(self._deal.batch, seed=self._seed, start=step, own=own, layers=self.layers)
        for x, layer in of:
            yield Batch(x, layer)

    def distinct(self, rows: int) -> int:
        return min(rows, self._rows)


class FollowFeed(Feed):
    """A store that another process is recording: every row once, in the order of the shards."""

    def __init__(self, config: TrainConfig, deal: Deal, stop: Callable[[], bool]) -> None:
        if deal.world.size > 1:
            raise InputError("a store that is being recorded is followed by one process: train with --from llm instead")
        self.config, self.deal, self._stop = config, deal, stop
        self.store = wait_for_rows(config.store, config.statistics, config.wait_seconds, stop=stop)
        if len(_chosen(self.store, config.layers)) < len(self.store.layers):
            raise InputError(f"a store that is followed gives all its layers, {list(self.store.layers)}: omit --layers")
        self.hookpoints = tuple(self.store.hookpoints)
        self.source: dict[str, Any] = self.store.manifest["source"]
        self.identity = {"source_of_rows": self.source, "statistics": config.statistics}
        self._follower: Follower | None = None
        self._saved: dict[str, Any] | None = None

    def normalizer(self, recipe: Recipe) -> Normalizer:
        if recipe.normalizer != "standard":
            raise InputError(
                f"recipe.normalizer {recipe.normalizer!r} needs a finished store, not one that is followed"
            )
        path = Path(self.config.output) / "statistics.safetensors"
        return Normalizer.from_moments(kept_moments(path, self.store.moments))

    def batches(self, step: int, position: dict[str, Any] | None) -> Iterator[Batch]:
        self._follower = Follower(
            self.config.store,
            self.deal.batch,
            seed=self.config.seed,
            state=position,
            wait_seconds=self.config.wait_seconds,
            stop=self._stop,
            on_wait=lambda: self.save(),  # the recorder waits for a release, which follows a save
        )
        for x, layer in self._follower:
            yield Batch(x, layer, None if len(x) == self.deal.batch else torch.arange(len(x)))

    def position(self) -> dict[str, Any] | None:
        self._saved = self._follower.state() if self._follower else None
        return self._saved

    def saved(self) -> None:
        if self._follower is not None and self._saved is not None:
            self._follower.release(self._saved)


class LiveFeed(Feed):
    """What a language model computes meanwhile, through a mixing buffer; nothing is stored unless asked for."""

    def __init__(self, config: TrainConfig, deal: Deal, device: torch.device) -> None:
        text.documents(config.text)  # an unknown file, data set or column shows before the model is loaded
        model, tokenizer = load_llm(config.llm, device)
        self.config, self.deal = config, deal
        self._source = Source(model, tokenizer, config, deal)
        self.hookpoints = tuple(self._source.hookpoints)
        n_blocks = drop_blocks_after(model, max(config.layers))  # their memory is the trainer's
        parameter = next(model.parameters())
        turns = buffer_turns(config, deal, self.hookpoints, parameter.element_size())
        # What a lane has computed and not yet given waits for the next filling: at most half a share of the buffer.
        share = turns * deal.batch // deal.lanes // len(self.hookpoints)
        self._source.batch_tokens = min(config.batch_tokens, max(share // 2, LEAST_TOKENS))
        place = torch.device("cpu") if config.buffer_device == "cpu" else device
        check_memory(turns * deal.most_rows * self._source.width * parameter.element_size(), place)
        self._source.open()  # wrong files and columns show before anything is computed
        self.source = stream_source(config) | {"blocks": n_blocks}
        self.identity = {"source_of_rows": self.source, "turns": turns, "lanes": deal.lanes}
        self._turns, self._place = turns, place
        self._stream: Stream | None = None
        self._keep: StoreWriter | None = None
        self._left_out: dict[str, int] = {}

    def normalizer(self, recipe: Recipe) -> Normalizer:
        path = Path(self.config.output) / "statistics.safetensors"
        if recipe.normalizer == "whitened":
            raise InputError("recipe.normalizer 'whitened' needs a finished store")
        moments = kept_moments(path, self._source.statistics, self.deal.world)
        self._source.medians = dict(zip(moments.layers, moments.median_norm.tolist(), strict=True))
        return Normalizer.from_moments(moments)

    def batches(self, step: int, position: dict[str, Any] | None) -> Iterator[Batch]:
        if self.config.record_to:
            self._keep = self._writer(Path(self.config.record_to))
        steps = -(-self.config.activations // self.deal.batch)
        self._stream = Stream(
            self._source, self._turns, self._place, seed=self.config.seed, steps=steps, keep=self._keep
        )
        yield from self._stream.batches(step, position)

    def _writer(self, folder: Path) -> StoreWriter:
        world = self.deal.world
        if world.size > 1:
            folder = folder / f"{world.rank + 1}-of-{world.size}"
        writer = StoreWriter(
            folder,
            self.hookpoints,
            source=self.source,
            resume=True,
            budget=bytes_of("disk_budget", self.config.disk_budget),
        )
        writer.sink_thresholds = self._source.sink_thresholds()
        writer.moments.median_norm[:] = torch.tensor(list(self._source.medians.values()))
        return writer

    def position(self) -> dict[str, Any]:
        assert self._stream is not None
        if self._keep is not None:
            self._keep.flush()  # what lies before the position will not be streamed again
        position = self._stream.position()
        self._left_out = {reason: sum(lane[reason] for lane in position["lanes"]) for reason in LEFT_OUT}
        return position

    def left_out(self) -> dict[str, int]:
        return self._left_out

    def heldout(self, rows: int) -> Batch | None:
        """The first rows of the documents that the text's split keeps from training."""
        text = self.config.text
        if text.part != "train" or not text.heldout:
            return None
        return self._source.rows_of(replace(text, part="heldout", limit=None), rows)

    def seconds(self) -> dict[str, float]:
        return {"llm": self._source.seconds, "buffer": self._stream.seconds if self._stream else 0.0}

    def close(self) -> None:
        if self._keep is not None:
            self._keep.close()


def stream_source(config: TrainConfig) -> dict[str, Any]:
    """Where the rows of a stream come from, as far as that is known before the language model is loaded."""
    values = to_dict(config) | {"text": text_settings(config.text), "long_documents": "chunk"}
    source = {key: values[key] for key in STREAM_ONLY}
    if not config.chunks:  # as before there were chunks, so that older runs continue
        del source["long_documents"]
    source["llm"] = {key: value for key, value in values["llm"].items() if key != "device_map"}
    return source


def open_feed(config: TrainConfig, deal: Deal, device: torch.device, stop: Callable[[], bool] = lambda: False) -> Feed:
    """What `config` says to train on, checked before anything is computed.

    Args:
        stop: asked while waiting for rows.

    Raises:
        InputError: an unusable store, model, layer, text or buffer.
        Stopped: `stop` said so.
    """
    if config.source == "llm":
        return LiveFeed(config, deal, device)
    if config.follow:
        return FollowFeed(config, deal, stop)
    return StoreFeed(ActivationStore(config.store), deal, config.seed, config.layers)


def kept_moments(path: Path, compute: Callable[[], Moments], world: World | None = None) -> Moments:
    """The moments in the file `path`, computed and saved there if it is missing: a resumed run has the same ones."""
    world = world or World()
    there = world.first(path.is_file())
    if not there:
        moments = compute()
        if world.main:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, [save(moments.state_dict())])
        world.wait()
    return Moments.from_state_dict(load_file(path))


def _chosen(store: ActivationStore, layers: Sequence[int]) -> list[int]:
    """The store's layers that are named, in its order; all of them if none is.

    Raises:
        InputError: a layer that the store does not have.
    """
    check_recorded(layers, store.layers)
    return [layer for layer in store.layers if not layers or layer in layers]


def _covariance(store: ActivationStore, layers: Sequence[int]) -> Tensor:
    """Covariance [L, d, d] of all rows of some layers of a store."""
    total = Covariance(layers, store.width)
    for indices in store.rows_at(layers).split(2**16):
        total.update(store.rows(indices), store.metadata(indices)[0])
    return total.covariance()
