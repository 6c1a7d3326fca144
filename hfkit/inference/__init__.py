"""What a loaded model does with a text.

controls: sampling options as transformers takes them
decoding: tokens to text while they are drawn
batches: prompts that fit, run together
generation: generate and stream
likelihood: log-probabilities of given tokens
classification, answering, inspection: the calls of these names
"""
