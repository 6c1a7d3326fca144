"""What a run leaves for people to read. Python computes the values; the `.jinja` files next to it hold the text.

summaries: what the metrics of a run or a search say, as texts
pages: the model card, and report pages of one run, of several runs and of a search; renders the `.jinja` files
pictures: loss curves, attention maps and searches, drawn with matplotlib
"""
