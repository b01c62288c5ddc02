"""Ways for heads to interact under one budget, and the properties that each of them must have."""
