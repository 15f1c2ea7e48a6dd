"""The official implementation's files as plain tensors.

`checkpoint` reads and writes its priors, `activations` its activation folders, and `convert` turns both into this
project's and back. Folders enter and leave; nothing in them is executed.
"""
