"""What a run found, for people: an HTML page, a model card, a table for the terminal, and their plots."""
