"""What each meta-neuron of a prior responds to and does.

`collect` reads documents through language model and prior once (`document_batches`, `unit_reader`) and keeps of each
unit its top documents, statistics, top logits, neighbours and, of a probing run, the tasks it is among the best at.
`store` holds these on disk. `describe` puts them into words, offline or by a judge, whose descriptions `detection`
tests. A prior, a model and documents enter; a `NeuronStore` leaves, which `report.site` shows.
"""
