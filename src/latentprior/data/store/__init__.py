"""Activations on disk: a folder of shards and a manifest."""
