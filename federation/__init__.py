"""A federation of real sites on Flower; README.md says how it is set up."""
