"""Reading and changing the hidden states of any decoder-only language model.

A *layer* is the index of a decoder block; its "output" side is `hidden_states[layer + 1]` of transformers, its "input"
side `hidden_states[layer]`, its "mlp" side the hidden units of its MLP, the input of the down projection.
"""

from latentprior.lm.hooks.blocks import check_in_range, drop_blocks_after, find_blocks, forward_parameters, text_config
from latentprior.lm.hooks.hookpoint import Hookpoint, at_layer, at_layers, check_recorded, same_places
from latentprior.lm.hooks.passes import (
    ForwardInputs,
    Outputs,
    blocks_before,
    cache_argument,
    capture,
    edit,
    forward_inputs,
    keeping,
    replaying,
    run_cut,
)

__all__ = [
    "ForwardInputs",
    "Hookpoint",
    "Outputs",
    "at_layer",
    "at_layers",
    "blocks_before",
    "cache_argument",
    "capture",
    "check_in_range",
    "check_recorded",
    "drop_blocks_after",
    "edit",
    "find_blocks",
    "forward_inputs",
    "forward_parameters",
    "keeping",
    "replaying",
    "run_cut",
    "same_places",
    "text_config",
]
