"""Making the plan so: reading ahead, computing, writing behind, the journal, and measuring what it took."""
