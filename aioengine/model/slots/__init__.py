"""Adapter slots on the device: their layout, images of adapters, and copies into them."""
