"""The generative latent prior: a flow-matching model of activations.

`glp` is the class that users hold: `normalizer` and `denoiser` in one, on the time convention of `flow`; `repair` puts
it on a running model. `files` reads and writes its folder, here or on the Hub, `loading` opens several to be compared,
`cost` counts what it takes, `official` is the other format. Raw activations [..., d] enter and leave.
"""
