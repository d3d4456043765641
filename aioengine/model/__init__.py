"""The native decoder and everything that a model step needs. Imports torch; nothing here imports asyncio."""
