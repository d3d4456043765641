"""Runs: experiments replayed, recorded, and compared with each other."""
