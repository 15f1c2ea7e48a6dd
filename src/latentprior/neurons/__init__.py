"""What each meta-neuron responds to and does: examples, statistics, effects, neighbours and descriptions."""
