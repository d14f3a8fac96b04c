"""The folder that leaves the house, and the card in it."""
