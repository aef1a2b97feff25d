"""Sampling answers, scoring them, and judging them."""
