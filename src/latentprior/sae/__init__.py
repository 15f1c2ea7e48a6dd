"""Sparse autoencoders (SAEs) of a hookpoint's activations: baselines of a prior, and sources of directions.

`sae`: the class, its files, and how well it explains activations. `saelens`: reading SAEs that SAELens saved.
`training`: a TopK SAE from an activation store. Raw activations enter; active latents, their values and
reconstructions leave.
"""
