"""Activations on disk: whole shards and a manifest that lists them, which no kill and no full disk can damage.

- `record`: a model and text to a store; `writer`: rows to shards, within a disk budget, resumable.
- `manifest`: the files, how each is written, named and checked.
- `reader`: `ActivationStore`, rows by number and shuffled batches.
- `follow`, `backpressure`: training on a store while it is being recorded.
"""
