"""What every other room may use: errors, units, dtype names. Imports nothing of ours."""
