"""Text to tokens.

formats: what files hold, and their text
rows: rows of tables, JSON, Parquet, Arrow and the Hub
folders: which files of a folder are read
examples: rows as texts, prompts with completions, or conversations
templates: how a row becomes a prompt and its answer
pieces: where a long text is cut
documents: any corpus as a stream of records
encoding: records to token ids
cache: tokens kept on disk
sequences: tokens as training sequences
labelled: rows for classification and question answering heads
overlap: what a text copies from a corpus
"""
