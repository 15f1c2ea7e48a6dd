"""Text goes in, activations come out: kept on disk (`store`) or live (`stream`), with their moments.

- `text`: documents of files, Hub datasets and the embedded `corpus`, mixed, resumable; `is_heldout` splits them.
- `tokens`: documents to padded `TokenBatch`es; `chat`, `prompts`: conversations to tokens.
- `activations`: `TokenBatch` and model to `ActivationBatch`, one row for each token; `sinks`: which rows are left out.
- `moments`: mean, variance, norms and covariance of each layer, added up batch by batch.
"""
