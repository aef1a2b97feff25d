"""Preference data, and judges held against people."""
