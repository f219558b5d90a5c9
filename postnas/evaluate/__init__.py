"""What a model can do and what a hybrid kept of its base.

Tasks of five kinds (multiple choice, last words, written answers, programs in a sandbox, long contexts), perplexity and
the copy test; the paper's groups; the paired verdict; and lm-evaluation-harness, unforked.
"""
