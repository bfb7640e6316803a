"""Pure functions on tensors: everything here needs torch alone and holds no state."""
