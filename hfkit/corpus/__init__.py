"""Text to tokens.

formats: what files hold, and their text
rows: rows of tables, JSON, Parquet, Arrow and the Hub
folders: which files of a folder are read
examples: rows as texts, prompts with completions, or conversations
templates: how a row becomes a prompt and its answer
pieces: where a long text is cut
documents: any corpus as a stream of records
chat: conversations as one text, and where the answers are in it
encoding: records to token ids
cache: tokens kept on disk
splitting: what is held out
streams: a corpus that is read again for each pass
sequences: tokens as training sequences and their batches
labelled: rows for classification and question answering heads
overlap: what a text copies from a corpus
"""
