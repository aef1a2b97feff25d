"""The standard comparison of parameter-efficient methods: tasks x methods x sizes x seeds, from a table in YAML.

    make bench-methods ARGS="--budget-hours 1"

A method is a line of the table, an expression as in a spec's `adapter`. Every cell of the comparison is one file, so a run
can be stopped at any moment and goes on where it was.
"""
