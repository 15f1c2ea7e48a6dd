"""Sparse autoencoders: reading, training, describing."""
