"""What trained networks are looked into with: the paper's grid, and its questions."""
