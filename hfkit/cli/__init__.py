"""The command line: one file for each command, its flags and what it prints.

app: all commands, and how each failure becomes one line
flags: dataclasses as flags, recipes as defaults
prompt_files: many prompts and their results
"""
