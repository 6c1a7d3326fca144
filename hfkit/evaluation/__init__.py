"""Measure a model.

perplexity: how well a model predicts a corpus
tasks: how well its answers or labels match the right ones
metrics: accuracy, F1, BLEU and ROUGE, as plain functions
"""
