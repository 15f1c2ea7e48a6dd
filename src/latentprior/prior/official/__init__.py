"""The official files, of which nothing is executed: `checkpoint`, `activations`, and `convert` from and to them."""
