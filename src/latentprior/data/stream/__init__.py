"""Live activations: sharded documents through a language model into a mixing buffer."""
