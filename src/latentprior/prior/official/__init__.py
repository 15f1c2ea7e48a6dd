"""The official implementation's files: `checkpoint` (priors), `activations` (folders of them), and `convert` both ways.

Nothing in a file is executed.
"""
