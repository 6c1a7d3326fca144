"""Measure a model.

perplexity: how well a model predicts a corpus
remote: the same by a server's log-probabilities
figures: the windows that both score, and what comes of that
tasks: how well a model's answers or labels match the right ones
metrics: accuracy, F1, BLEU and ROUGE, as plain functions
"""
