"""Resolvers: find the folder of an adapter that nobody registered, by its name."""
