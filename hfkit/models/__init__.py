"""Find a model's files and load its weights.

sources: from a name to a local folder, with a download where needed
folder: what is in such a folder, and whether it is safe to load
tensorflow: checkpoints of TensorFlow, converted once into the cache
bundle: the tensors in such a checkpoint, read without TensorFlow
architecture: what a configuration says about a model; devices and precisions
loading: models with their tokenizers
wordpiece: GPT-2 with the vocabulary of BERT, as Chinese models have it
integrity: what a library loads is what was saved; errors in one line
quantization: int8 and int4 on a CPU
kernels: activations, attention and heads in the form that suits a device
exporting: write a model to one folder or file, or push it to the Hub
gguf_export, gguf_tokenizer, modelfile: a model for llama.cpp and ollama
gguf_import: what transformers leaves out when it reads one
"""
