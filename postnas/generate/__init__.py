"""Text from a model, token by token, and what a token costs."""
