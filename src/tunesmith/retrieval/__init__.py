"""Retrieval: finding what is near a question."""
