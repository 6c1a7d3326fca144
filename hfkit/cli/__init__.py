"""The command line: one file for each command or family of commands, with its flags and what it prints.

app: all commands, and how each failure becomes one line
flags: from a function to a command, its help, and what to write instead of a mistake; recipes as defaults
prompts: the prompt, or many from a file, and the model that continues them
generate_file: many prompts, and a file of results that an interrupted run continues
serve: the server, and the command `warm`; resident: the process that it starts
"""
