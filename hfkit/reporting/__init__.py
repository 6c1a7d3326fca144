"""What a run leaves for people.

pages: model cards and report pages
pictures: curves, attention maps and searches as PNG files
"""
