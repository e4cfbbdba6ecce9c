"""What will happen: the recipe, the layout of the output, the schedule. Reads no tensor bytes and no clock."""
