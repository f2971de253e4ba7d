"""Retrieval: texts to sparse vectors, exact search, measures, BM25, saved models."""
