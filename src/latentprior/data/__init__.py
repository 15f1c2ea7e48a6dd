"""Text to tokens to activations, and their moments; kept on disk (`store`) or live (`stream`)."""
