"""Find a model's files and load its weights.

sources: from a name to a local folder that is safe to load
folder: what is in such a folder
download: a model of the Hub in the local cache
architecture: what a configuration says about a model; devices and precisions
tokenizers: the tokenizer as it was saved
loading: models with their tokenizers
integrity: what a library loads is what was saved; errors in one line
quantization: int8 and int4 on a CPU
exporting: write a model to one folder, or push it to the Hub
"""
