"""What a hybrid kept of its base: perplexity, copying, multiple choice, and the paired verdict."""
