"""Pure functions on tensors. Shape letters: B batch, T tokens, H heads, K key dim, V value dim, D channels, W taps."""
