"""Live activations: what a language model computes, mixed in a buffer, instead of a store on disk.

`sharding` spreads documents over document shards, which come in an order of their own whoever serves them;
`live` runs the language model on this process's shards; `buffer` mixes their rows and draws batches from them.
A text's configuration and a model enter; batches of this process's rows leave, and a position to continue from.
"""
