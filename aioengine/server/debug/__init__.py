"""What a server is doing at this moment, for those who run it."""
