"""Search for training options.

search: `tune`, each trial a run
study: the trials on disk, and the ranges they draw from
"""
