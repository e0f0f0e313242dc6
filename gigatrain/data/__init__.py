"""Documents to batches: sources -> tokenizer -> shards (build), then mixture -> pack -> loader, where order is a pure function.

All but the loader is free of torch.
"""
