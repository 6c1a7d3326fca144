"""Search for training options.

search: `tune`, each trial a run
study: the trials on disk, which several processes share
space: the ranges that they draw from
"""
