"""The configuration of a server: where it comes from, and the commands that check and show it."""
