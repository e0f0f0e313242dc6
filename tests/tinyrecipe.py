"""The tiny recipe's text, for the fixtures and for programs that are no tests."""

TINY = """
name = "tiny"
[model.architecture]
family = "llama"
vocab = 320
hidden = 32
layers = 2
heads = 4
kv_heads = 2
head_dim = 8
intermediate = 48
tied = true
[tokenizer.train]
vocab = 320
[data]
sources = [{{ kind = "text", path = "{corpus}", pattern = "*.py" }}]
folder = "{cache}"
validation = 0.1
[train]
sequence = 32
batch = 4
steps = 12
precision = "fp32"
[optim]
lr = 3e-3
[schedule]
warmup = 2
[validation]
every = 5
[checkpoint]
every = 3
keep = 2
[report]
every = 2
trackers = []
"""
