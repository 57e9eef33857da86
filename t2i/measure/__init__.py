"""What the pictures are worth: features, Frechet and kernel distances, held-out losses."""
