"""Bytes: headers, checkpoints, reading and writing at offsets. Knows no torch and no mathematics."""
