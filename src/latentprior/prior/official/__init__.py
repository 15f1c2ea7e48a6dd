"""Checkpoints and activation folders of the official implementation."""
