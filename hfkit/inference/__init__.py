"""What a loaded model does with a text. No call changes a model, a tokenizer or the process: threads may share them.

text: a prompt as token ids that fit the model, and what tokens write
controls: sampling options as transformers takes them
decoding: what happens at each step while texts are generated
graphs: decoding on a GPU with a recorded CUDA graph
batches: requests run together
generation: generate and stream
likelihood: log-probabilities of given tokens
scores: their sums
remote, connection: a model on a server
results: what generate and classify return
classification, answering, inspection: the calls of these names
"""
