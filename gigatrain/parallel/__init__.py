"""How ranks share a model: one file per parallelism, over the named axes of one mesh."""
