"""Numbers: what a method is, sums with fixed bits, magnitude cuts, chance, and compiling. Knows no files."""
