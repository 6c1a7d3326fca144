"""Search for training options.

search: `tune`, each trial a run
study: the trials on disk, which several processes share, and the ranges that they draw from
"""
