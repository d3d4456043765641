"""Resolvers: from the name of an adapter that is not registered to a local folder."""
