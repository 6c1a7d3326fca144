"""Text to tokens, and tokens to what a model is trained on.

files: which files a corpus is
formats: what a file holds, and its text
rows: the rows of tables, JSON, Parquet, Arrow and the Hub
examples: rows as texts, prompts with completions, or conversations, in the forms that are known
conversations: messages as other tools write them
templates: how a prompt and its answer, or a conversation, become one text
documents: any corpus as a stream of records
encoding: records to token ids
cache: tokens kept on disk
sequences: tokens as training sequences and their batches
training_data: what is trained on and what is held out
labelled: rows for classification and question answering heads
overlap: what a text copies from a corpus
"""
