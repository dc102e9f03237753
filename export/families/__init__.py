"""One file for each family of models; found by listing this folder."""
