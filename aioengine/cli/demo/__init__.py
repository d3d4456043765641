"""``aioengine demo``: four adapters served through two slots, shown in the terminal."""
