"""Several engines behind a gateway, in virtual time."""
