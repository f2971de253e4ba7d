"""Data: collections, training examples, resumable loaders and the validation pool."""
