"""One file per operation: formula, reference, cases, fast versions. Torch only; imports nothing of gigatrain but errors, so it can be lifted out."""
