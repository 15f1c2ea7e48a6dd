"""1-D probing: how well single features, such as meta-neurons, tell the classes of labelled texts apart."""
