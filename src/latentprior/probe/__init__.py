"""1-D probing: how well single features, such as meta-neurons, tell the classes of labelled texts apart.

Tasks (`tasks`) are recorded once (`recording`); each source of features (`sources`) is probed on each task
(`benchmark`); `summary` averages over tasks, and `experiment` runs all of it from a configuration and writes
``probe.json``. `tables` shows a result as text; `names` holds families of tasks and short names.
"""
