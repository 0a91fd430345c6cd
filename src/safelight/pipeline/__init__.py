"""How an image is made, stage by stage."""
