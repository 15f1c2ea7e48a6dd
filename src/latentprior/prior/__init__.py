"""The generative latent prior: denoiser, flow, normalizer, `GLP` and its files."""
