"""Documents to batches: sources -> tokenizer -> shards (build, free of torch), then mixture -> pack -> loader, where order is a pure
function.
"""
