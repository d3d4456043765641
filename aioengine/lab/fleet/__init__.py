"""Several engines behind a door, in virtual time."""
