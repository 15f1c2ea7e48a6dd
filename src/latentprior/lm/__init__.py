"""Language models: loading, decoder blocks, hooks, which positions a forward pass holds, and edits of them."""
