"""What a run leaves for people to read. Python computes the values; the `.jinja` files next to it hold the text.

summaries: what a run's metrics say, as texts
pages: the model card, and report pages of one run, of several runs and of a search
pictures: loss curves, attention maps and searches, drawn with matplotlib
templates: renders the `.jinja` files, and escapes what they show
"""
