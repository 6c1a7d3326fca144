"""Measure a model.

perplexity: how well a model predicts a corpus
figures: what that gives
remote: the same by a server's log-probabilities
windows: cuts its documents into what is predicted from what
tasks: how well its answers or labels match the right ones
metrics: accuracy, F1, BLEU and ROUGE, as plain functions
"""
