"""Arms of one recipe, trained with the same budget on the same rows, and how far they differ."""
