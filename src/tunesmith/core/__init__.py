"""The shared nouns: record, row, segment, errors, registry."""
