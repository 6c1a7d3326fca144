"""Measure a model.

perplexity: how well it predicts a corpus
tasks: its answers against the right ones
metrics: accuracy, F1, BLEU, ROUGE
"""
