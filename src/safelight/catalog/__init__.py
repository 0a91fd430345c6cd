"""What the user has: models, adapters and input images. No torch."""
