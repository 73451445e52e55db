"""From text to batches: tokenizer, WebDataset token shards, index, exact order, loader. Imports only sisa_dist.config.

Nothing is imported here, so that `sisa prepare` does not pay for torch, which only the loader needs.
"""
