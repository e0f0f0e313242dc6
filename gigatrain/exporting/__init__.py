"""What lies beside the weights of an export: how to generate (generation.py), where it is from (card.py), and who can read it (readers.py)."""
