"""The parts of scripts/bench. None of them is imported by the package.

Everything but writer.py and ties_reference.py uses the standard library alone, so that the process which measures stays
small (measure.py says why).
"""
