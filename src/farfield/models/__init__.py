"""Small, readable models built from the attention layer."""
