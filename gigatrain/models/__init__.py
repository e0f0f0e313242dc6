"""The decoder, and its weights in transformers' layout."""
