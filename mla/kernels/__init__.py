"""Implementations behind the ops; one family a file, chosen by `mla.ops.select`."""
