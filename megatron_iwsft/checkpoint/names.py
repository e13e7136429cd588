"""Names of files and directories of checkpoints (their layout is in info.py). Imports nothing."""

CHECKPOINTS = "checkpoints"  # in a run directory
LATEST = "latest"
BEST = "best"
INFO = "iwsft.json"
TOKENIZER = "tokenizer"
