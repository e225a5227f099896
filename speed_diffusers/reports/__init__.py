"""Pictures and texts: grids of images, errors, strategies side by side, what a run costs."""
