"""One folder per family; families never import each other."""
