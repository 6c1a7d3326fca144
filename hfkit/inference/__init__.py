"""What a loaded model does with a text. No call changes a model, a tokenizer or the process: threads may share them.

prompts: a prompt as token ids that fit the model
vocabulary: what tokens write, and which would complete a banned text
controls: sampling options as transformers takes them
decoding: tokens to text while they are generated
batches: requests run together
generation: generate and stream
likelihood: log-probabilities of given tokens
twins: copies of a model that share its weights
classification, answering, inspection: the calls of these names
"""
