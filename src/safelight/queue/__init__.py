"""Jobs and images: the database, the order, image files, events. No torch."""
